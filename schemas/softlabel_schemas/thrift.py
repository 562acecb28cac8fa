"""Thrift's compact protocol, as far as Parquet's metadata needs it: structs as dicts by field id.

Sizes are checked against the bytes that are there before anything is made of them; the number of values is limited.
"""

from __future__ import annotations

from typing import Any

_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)
_INTEGERS = (_I16, _I32, _I64)
# Parquet nests seven deep.
_MAX_DEPTH = 16

Struct = dict[int, Any]


def read_struct(data: bytes | memoryview, start: int, stop: int, *, max_values: int) -> tuple[Struct, int]:
    """The struct that begins at ``start``, and where it ends, ``stop`` at most.

    Integers are ``int``, binaries and doubles ``bytes``, lists and sets ``list``, maps ``list`` of key and value in turn.

    Raises:
        ValueError: not a struct within these bytes, or of more than ``max_values`` values.
    """
    reader = _Reader(data, start, stop, max_values)
    try:
        value = reader.struct(0)
    except IndexError:
        reader.position = stop + 1
    if reader.position > stop:
        raise ValueError("Thrift metadata is cut short")
    return value, reader.position


class _Reader:
    def __init__(self, data: bytes | memoryview, position: int, stop: int, max_values: int) -> None:
        self._data, self.position, self._stop, self._values_left = data, position, stop, max_values

    def struct(self, depth: int) -> Struct:
        fields: Struct = {}
        field_id = 0
        while True:
            header = self._data[self.position]
            self.position += 1
            if header == 0:
                return fields
            # A delta of 0: the id follows.
            field_id = field_id + (header >> 4) if header >> 4 else self._zigzag()
            if field_id in fields:
                raise ValueError(f"Thrift field {field_id} is repeated")
            kind = header & 15
            if kind in _INTEGERS:
                # Most fields: nothing is called for them that need not be.
                self._counted(None)
                fields[field_id] = self._zigzag()
            elif kind in (_TRUE, _FALSE):
                # In a field, and there alone, a boolean is its type.
                fields[field_id] = self._counted(kind == _TRUE)
            else:
                fields[field_id] = self._value(kind, depth + 1)

    def _value(self, kind: int, depth: int) -> Any:
        self._counted(None)
        if depth > _MAX_DEPTH:
            raise ValueError(f"Thrift metadata is nested more than {_MAX_DEPTH} deep")
        if kind in _INTEGERS:
            return self._zigzag()
        if kind == _BINARY:
            return self._bytes(self._varint())
        if kind == _STRUCT:
            return self.struct(depth)
        if kind in (_LIST, _SET):
            header = self._bytes(1)[0]
            size = header >> 4
            return self._values(self._varint() if size == 15 else size, (header & 15,), depth)
        if kind in (_TRUE, _FALSE, _BYTE):
            return self._bytes(1)[0]
        if kind == _DOUBLE:
            return self._bytes(8)
        if kind == _MAP:
            size = self._varint()
            kinds = self._bytes(1)[0] if size else 0
            return self._values(size, (kinds >> 4, kinds & 15), depth)
        raise ValueError(f"Thrift type {kind} is unknown")

    def _values(self, size: int, kinds: tuple[int, ...], depth: int) -> list[Any]:
        # Every value takes a byte at least.
        if size * len(kinds) > self._stop - self.position:
            raise ValueError(f"Thrift metadata claims {size} values in {self._stop - self.position} bytes")
        return [self._value(kind, depth + 1) for _ in range(size) for kind in kinds]

    def _counted(self, value: bool | None) -> bool | None:
        self._values_left -= 1
        if self._values_left < 0:
            raise ValueError("Thrift metadata has too many values")
        return value

    def _bytes(self, size: int) -> bytes:
        start = self.position
        self.position += size
        if self.position > self._stop:
            raise IndexError
        return bytes(self._data[start : self.position])

    def _zigzag(self) -> int:
        value = self._data[self.position]
        if value < 0x80:
            self.position += 1
        else:
            value = self._varint()
        return value >> 1 ^ -(value & 1)

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._data[self.position]
            self.position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("a Thrift integer has more than 64 bits")
