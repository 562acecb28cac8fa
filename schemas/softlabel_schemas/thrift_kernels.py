"""Compiled loop of the Thrift reader: bytes -> a flat list of tokens. No size is believed but by the bytes that are there."""

from __future__ import annotations

import numpy as np

from softlabel_schemas.compiled import compiled

# Kinds of tokens. What STRUCT and LIST begin, END ends; that of the outermost struct is left out.
INTEGER, BOOLEAN, BYTES, STRUCT, LIST, END = range(6)
GOOD, CUT_SHORT, TOO_DEEP, TOO_MANY, TOO_LARGE, TOO_LONG, UNKNOWN = range(7)
PROBLEMS = {
    CUT_SHORT: "is cut short",
    TOO_DEEP: "is nested too deep",
    TOO_MANY: "has too many values",
    TOO_LARGE: "claims more values than there are bytes",
    TOO_LONG: "has an integer of more than 64 bits",
    UNKNOWN: "has a value of an unknown type",
}
# Parquet nests seven deep.
_MAX_DEPTH = 16
# Types in the bytes; I16, I32 and I64 are written alike.
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)


@compiled()
def tokenize(data, max_values, tokens):
    """Take apart the struct that begins with the first byte; returns (GOOD or what is wrong, bytes read, tokens made).

    Args:
        data: u1 [n].
        tokens: i8 [2 x the smaller of n and max_values, 3], filled: kind; field id (0 in a list); and the value: the integer or
            boolean, or for bytes where they begin x 2^32 + how many they are.
    """
    # Of each struct and list that is open: values left (-1: a struct, which has an end), the last field id, the types of a
    # list's values in turn.
    left, fields = np.zeros(_MAX_DEPTH + 1, np.int64), np.zeros(_MAX_DEPTH + 1, np.int64)
    kinds = np.zeros((_MAX_DEPTH + 1, 2), np.int64)
    left[0] = -1
    depth = position = num_tokens = num_values = 0
    while True:
        kind, field = _STRUCT, np.int64(0)
        is_end = left[depth] == 0
        if left[depth] > 0:
            left[depth] -= 1
            kind = kinds[depth, left[depth] & 1]
        elif left[depth] < 0:
            if position >= len(data):
                return CUT_SHORT, position, num_tokens
            header = np.int64(data[position])
            position += 1
            kind, is_end = header & 15, header == 0
            field = fields[depth] + (header >> 4)
            if not is_end and header < 16:
                # A delta of 0: the id follows.
                field, position = _zigzag(data, position)
            fields[depth] = field
        if is_end:
            if depth == 0:
                return GOOD, position, num_tokens
            depth -= 1
            tokens[num_tokens, 0] = END
            num_tokens += 1
            continue
        num_values += 1
        if num_values > max_values:
            return TOO_MANY, position, num_tokens
        token, value, size = INTEGER, np.int64(0), np.int64(0)
        if _I16 <= kind <= _I64:
            value, position = _zigzag(data, position)
        elif kind in (_TRUE, _FALSE, _BYTE):
            # In a struct, and there alone, a boolean is its type.
            if left[depth] < 0 and kind != _BYTE:
                token, value = BOOLEAN, np.int64(kind == _TRUE)
            else:
                value, position = _byte(data, position)
        elif kind == _STRUCT:
            token, size = STRUCT, np.int64(-1)
        elif kind == _DOUBLE:
            token, size = BYTES, np.int64(8)
        elif kind == _BINARY:
            token = BYTES
            size, position = _varint(data, position)
        elif kind in (_LIST, _SET):
            token = LIST
            header, position = _byte(data, position)
            size, first, second = header >> 4, header & 15, header & 15
            if size == 15:
                size, position = _varint(data, position)
        elif kind == _MAP:
            token = LIST
            size, position = _varint(data, position)
            header = np.int64(0)
            if size:
                header, position = _byte(data, position)
            size, first, second = 2 * size, header >> 4, header & 15
        else:
            return UNKNOWN, position, num_tokens
        if position < 0:
            return TOO_LONG, position, num_tokens
        if position > len(data):
            return CUT_SHORT, position, num_tokens
        if token == BYTES:
            if not 0 <= size <= len(data) - position:
                return CUT_SHORT, position, num_tokens
            value = position << 32 | size
            position += size
        elif token != INTEGER and token != BOOLEAN:
            # Every value of a list takes a byte at least.
            if not -1 <= size <= len(data) - position:
                return TOO_LARGE, position, num_tokens
            depth += 1
            if depth > _MAX_DEPTH:
                return TOO_DEEP, position, num_tokens
            left[depth], fields[depth] = size, 0
            if token == LIST:
                kinds[depth, 1], kinds[depth, 0] = first, second
        tokens[num_tokens, 0], tokens[num_tokens, 1], tokens[num_tokens, 2] = token, field, value
        num_tokens += 1


@compiled()
def _byte(data, position):
    """The byte, and where the next one is: beyond the end where there is none."""
    if position >= len(data):
        return np.int64(0), len(data) + 1
    return np.int64(data[position]), position + 1


@compiled()
def _varint(data, position):
    """The integer, and where the next value begins: -1 where it is too long, beyond the end where it is cut short."""
    value, shift = np.uint64(0), np.uint64(0)
    while position < len(data):
        byte = np.uint64(data[position])
        position += 1
        value |= (byte & np.uint64(0x7F)) << shift
        if byte < np.uint64(0x80):
            return np.int64(value), position
        shift += np.uint64(7)
        if shift > np.uint64(63):
            return np.int64(0), -1
    return np.int64(0), len(data) + 1


@compiled()
def _zigzag(data, position):
    value, position = _varint(data, position)
    return np.int64(np.uint64(value) >> np.uint64(1)) ^ -(value & 1), position
