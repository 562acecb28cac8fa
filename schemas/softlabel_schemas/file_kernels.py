"""Compiled loop that finds the lists of files in a document and checks them."""

from __future__ import annotations

import numpy as np

from softlabel_schemas.compiled import compiled


def _bytes_of(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)


_FIELD = _bytes_of('"files":[')
_NAME, _NUM_BYTES, _SHA256, _END = map(_bytes_of, ('{"name":"', '","num_bytes":', ',"sha256":"', '"}'))
_HEX_DIGITS = 64
# With the shortest name and number: so many bytes a list has at least.
SHORTEST_LIST = sum(map(len, (_FIELD, _NAME, _NUM_BYTES, _SHA256, _END))) + _HEX_DIGITS + 3

_WORD, _SEPARATOR, _HEX = 1, 2, 4
_CLASSES = np.zeros(256, np.uint8)
_CLASSES[_bytes_of("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_")] |= _WORD
_CLASSES[_bytes_of("./")] |= _SEPARATOR
_CLASSES[_bytes_of("0123456789abcdef")] |= _HEX
_COMMA, _BRACKET, _ZERO = 0x2C, 0x5D, 0x30
# Of a count; more would be larger than any.
_MAX_DIGITS = 18


@compiled()
def find_lists(data, max_name, max_count, lists):
    """The lists that ``"files"`` names; returns how many there are, or -1 where one is not as a writer of ours writes it: valid
    records in canonical JSON, at least one, sorted by name, each once.

    Args:
        data: u1 [n], any bytes; in JSON the name is not within a string, whose quotes are escaped, but may be the end of one.
        max_name, max_count: the longest name, the largest number of bytes of a file.
        lists: i8 [n // SHORTEST_LIST, 3], filled: where each begins and ends, and the bytes of its files together.
    """
    position = num_lists = 0
    while position < len(data):
        start = _after(data, position, _FIELD)
        if start < 0:
            position += 1
            continue
        position, num_bytes = _list_end(data, start, max_name, max_count)
        if position < 0:
            return -1
        lists[num_lists, 0], lists[num_lists, 1], lists[num_lists, 2] = start - 1, position, num_bytes
        num_lists += 1
    return num_lists


@compiled()
def _list_end(data, position, max_name, max_count):
    """Where a list ends whose first record begins at ``position``, -1 where it is another; the bytes of its files."""
    last, last_length, num_bytes = 0, 0, 0
    while True:
        name = _after(data, position, _NAME)
        length = _name_length(data, name, max_name)
        if length < 0 or not _follows(data, last, last_length, name, length):
            return -1, 0
        last, last_length = name, length
        position, count = _count(data, _after(data, name + length, _NUM_BYTES))
        position = _after(data, position, _SHA256)
        if count > max_count or not _are_hex(data, position):
            return -1, 0
        num_bytes += count
        position = _after(data, position + _HEX_DIGITS, _END)
        if position < 0 or position >= len(data):
            return -1, 0
        position += 1
        if data[position - 1] == _BRACKET:
            return position, num_bytes
        if data[position - 1] != _COMMA:
            return -1, 0


@compiled()
def _after(data, position, literal):
    """The position behind ``literal``; -1 where it does not stand there, and for a position of -1."""
    if position < 0 or len(data) - position < len(literal):
        return -1
    for k in range(len(literal)):
        if data[position + k] != literal[k]:
            return -1
    return position + len(literal)


@compiled()
def _name_length(data, start, max_name):
    """-1 where no name of a file begins there: words, one separator between two."""
    if start < 0:
        return -1
    after_word = False
    for k in range(min(len(data) - start, max_name + 1)):
        kind = _CLASSES[data[start + k]]
        if kind & _WORD:
            after_word = True
        elif not after_word:
            return -1
        elif kind == _SEPARATOR:
            after_word = False
        else:
            return k
    return -1


@compiled()
def _follows(data, first, first_length, second, second_length):
    """Whether the second name is the larger one; letters are ASCII, so that bytes are in the order of text."""
    for k in range(min(first_length, second_length)):
        if data[first + k] != data[second + k]:
            return data[first + k] < data[second + k]
    return first_length < second_length


@compiled()
def _count(data, start):
    """Where the integer at ``start`` ends, -1 where there is none in canonical form, and its value."""
    value, position = 0, start
    if start < 0:
        return -1, 0
    while position < len(data) and 0 <= data[position] - _ZERO <= 9 and position - start < _MAX_DIGITS:
        value = 10 * value + data[position] - _ZERO
        position += 1
    if position == start or (data[start] == _ZERO and position > start + 1):
        return -1, 0
    return position, value


@compiled()
def _are_hex(data, start):
    if start < 0 or len(data) - start < _HEX_DIGITS:
        return False
    common = _HEX
    for k in range(_HEX_DIGITS):
        common &= _CLASSES[data[start + k]]
    return common != 0
