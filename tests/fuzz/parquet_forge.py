"""A Parquet shard taken apart into pages and Thrift trees, changed anywhere, and put together again consistently."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

import pyarrow as pa

from tests.fuzz import seeds
from tests.fuzz.mutate import mutate_bytes, mutate_int, mutate_values, varint

_BOOLEANS, _INTEGERS, _BINARY, _LIST, _STRUCT = (1, 2), (4, 5, 6), 8, 9, 12
# A field is [id, type, value], a list (type of the elements, values), a struct a list of fields.
Tree = list[list[Any]]


@dataclass
class Page:
    header: Tree
    values: bytes


@dataclass
class File:
    """``chunks``: of each row group, of each column, the pages."""

    footer: Tree
    chunks: list[list[list[Page]]]


def take_apart(data: bytes) -> File:
    size = int.from_bytes(data[-8:-4], "little")
    footer, _ = _parse(data, len(data) - 8 - size)
    chunks = []
    for group in _get(footer, 4)[1]:
        columns = []
        for column in _get(group, 1)[1]:
            metadata = _get(column, 3)
            position = _get(metadata, 9)
            stop = position + _get(metadata, 7)
            pages = []
            while position < stop:
                header, position = _parse(data, position)
                compressed = data[position : position + _get(header, 3)]
                position += len(compressed)
                values = pa.decompress(compressed, _get(header, 2), codec="zstd", asbytes=True)
                pages.append(Page(header, values))
            columns.append(pages)
        chunks.append(columns)
    return File(footer, chunks)


def forge(rng: Random, number: int) -> bytes:
    """The Parquet shard of seed ``number``, changed in one place or several; sizes, offsets and checksums mostly fit."""
    file = _copy_of(_apart(number))
    honest = rng.random() < 0.8
    for _ in range(rng.choice((1, 1, 2, 3))):
        what = rng.choice((0, 1, 1, 1, 2, 3, 4))
        if what <= 2 and file.chunks:
            honest = _mutate_pages(rng, file.chunks, what) and honest
        elif what == 3 and file.chunks:
            group = rng.randrange(len(file.chunks))
            file.chunks.insert(group, file.chunks[group])
            _get(file.footer, 4)[1].insert(group, copied(_get(file.footer, 4)[1][group]))
        else:
            return put_together(rng, file, fit_pages=honest, mutate_footer=True)
    return put_together(rng, file, fit_pages=honest, mutate_footer=rng.random() < 0.1)


def forge_block(rng: Random, number: int) -> tuple[bytes, int]:
    """A row group of it, changed likewise, and its number of rows."""
    file = _copy_of(_apart(number))
    group = rng.randrange(len(file.chunks))
    chunks = [file.chunks[group]]
    honest = rng.random() < 0.8
    for _ in range(rng.choice((1, 1, 2, 3))):
        honest = _mutate_pages(rng, chunks, rng.choice((0, 1, 1, 1, 2))) and honest
    data = b"".join(_page_bytes(page, fit=honest) for chunk in chunks[0] for page in chunk)
    return data, _get(_get(file.footer, 4)[1][group], 3)


def _mutate_pages(rng: Random, chunks: list[list[list[Page]]], what: int) -> bool:
    """A header, values or the number of pages; false where the sizes in headers shall stay as they are."""
    pages = [page for columns in chunks for chunk in columns for page in chunk]
    if what == 0 and pages:
        _mutate_tree(rng, rng.choice(pages).header)
        return rng.random() < 0.3
    if what == 1 and pages:
        page = rng.choice(pages)
        page.values = mutate_values(rng, page.values)
    elif what == 2:
        chunk = rng.choice(rng.choice(chunks))
        if chunk:
            chunk.insert(rng.randrange(len(chunk)), rng.choice(pages)) if rng.random() < 0.7 else chunk.pop()
    return True


@cache
def _apart(number: int) -> File:
    return take_apart(seeds.shards()[number].parquet["shard.parquet"])


def _copy_of(file: File) -> File:
    return File(
        copied(file.footer),
        [[[Page(copied(page.header), page.values) for page in pages] for pages in columns] for columns in file.chunks],
    )


def copied(value: Any) -> Any:
    """``copy.deepcopy`` would take half of the time."""
    if isinstance(value, list):
        return [copied(item) for item in value]
    return (value[0], copied(value[1])) if isinstance(value, tuple) else value


def put_together(rng: Random, file: File, *, fit_pages: bool, mutate_footer: bool) -> bytes:
    data = b"PAR1"
    for group, columns in zip(_get(file.footer, 4)[1], file.chunks, strict=True):
        for column, pages in zip(_get(group, 1)[1], columns, strict=True):
            metadata = _get(column, 3)
            start = len(data)
            data += b"".join(_page_bytes(page, fit=fit_pages) for page in pages)
            if pages:
                _set(metadata, 9, start)
                _set(metadata, 7, len(data) - start)
    footer = file.footer
    if mutate_footer:
        for _ in range(rng.choice((1, 1, 3))):
            _mutate_tree(rng, footer)
    encoded = serialize(footer)
    if rng.random() < 0.05:
        encoded = mutate_bytes(rng, encoded)
    return data + encoded + len(encoded).to_bytes(4, "little") + b"PAR1"


def _page_bytes(page: Page, *, fit: bool) -> bytes:
    payload = pa.compress(page.values, codec="zstd", asbytes=True)
    if fit:
        _set(page.header, 2, len(page.values))
        _set(page.header, 3, len(payload))
    # Always: what is behind the checksum shall be reached.
    _set(page.header, 4, zlib.crc32(payload) - (zlib.crc32(payload) >> 31 << 32))
    return serialize(page.header) + payload


def _mutate_tree(rng: Random, tree: Tree) -> None:
    """One field somewhere in the tree."""
    structs = _structs(tree)
    struct = rng.choice([found for found in structs if found] or [tree])
    if not struct:
        return
    field = rng.choice(struct)
    action = rng.randrange(10)
    if action == 0:
        struct.remove(field)
    elif action == 1:
        struct.append(copied(field))
    elif action == 2:
        field[0] = rng.choice((*range(1, 16), -1, 32767))
    elif action == 3:
        # Of another type, mostly.
        field[1:] = copied(rng.choice(rng.choice([found for found in structs if found]))[1:])
    elif field[1] in _INTEGERS:
        field[2] = mutate_int(rng, field[2])
    elif field[1] in _BOOLEANS:
        field[1] = 3 - field[1]
    elif field[1] == _BINARY:
        field[2] = mutate_bytes(rng, field[2])
    elif field[1] == _LIST:
        kind, values = field[2]
        if 0 < len(values) < 100 and rng.random() < 0.5:
            values *= rng.choice((2, 3, 50))
        elif values:
            values.pop(rng.randrange(len(values)))
        field[2] = (kind if rng.random() < 0.9 else rng.randrange(16), values)
    else:
        # A copy: a struct within itself has no end.
        field[2] = copied(rng.choice(structs))


def _structs(tree: Tree) -> list[Tree]:
    found, pending = [], [tree]
    while pending:
        struct = pending.pop()
        found.append(struct)
        for _, kind, value in struct:
            if kind == _STRUCT:
                pending.append(value)
            elif kind == _LIST and value[0] == _STRUCT:
                pending.extend(item for item in value[1] if isinstance(item, list))
    return found


def _get(tree: Tree, field_id: int) -> Any:
    return next(value for found, _, value in tree if found == field_id)


def _set(tree: Tree, field_id: int, value: int) -> None:
    for field in tree:
        if field[0] == field_id and field[1] in _INTEGERS:
            field[2] = value


def _parse(data: bytes, position: int) -> tuple[Tree, int]:
    tree: Tree = []
    field_id = 0
    while data[position]:
        header = data[position]
        position += 1
        field_id += header >> 4
        if not header >> 4:
            field_id, position = _parse_integer(data, position)
        value, position = _parse_value(data, position, header & 15)
        tree.append([field_id, header & 15, value])
    return tree, position + 1


def _parse_value(data: bytes, position: int, kind: int) -> tuple[Any, int]:
    if kind in _BOOLEANS:
        return None, position
    if kind in _INTEGERS:
        return _parse_integer(data, position)
    if kind == _STRUCT:
        return _parse(data, position)
    if kind == _BINARY:
        size, position = _parse_varint(data, position)
        return data[position : position + size], position + size
    assert kind == _LIST, kind
    size, element = data[position] >> 4, data[position] & 15
    position += 1
    if size == 15:
        size, position = _parse_varint(data, position)
    values = []
    for _ in range(size):
        value, position = _parse_value(data, position, element)
        values.append(value)
    return (element, values), position


def _parse_varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[position] & 0x7F) << shift
        shift += 7
        position += 1
        if data[position - 1] < 0x80:
            return value, position


def _parse_integer(data: bytes, position: int) -> tuple[int, int]:
    value, position = _parse_varint(data, position)
    return value >> 1 ^ -(value & 1), position


def serialize(tree: Tree) -> bytes:
    out = b""
    last = 0
    for field_id, kind, value in tree:
        delta = field_id - last
        last = field_id
        out += bytes([delta << 4 | kind]) if 0 < delta < 16 else bytes([kind]) + _integer(field_id)
        out += _serialize_value(kind, value)
    return out + b"\x00"


def _serialize_value(kind: int, value: Any) -> bytes:
    if isinstance(value, int):
        return _integer(value)
    if isinstance(value, bytes):
        return varint(len(value)) + value
    if isinstance(value, tuple):
        element, values = value
        size = len(values)
        head = bytes([size << 4 | element]) if size < 15 else bytes([0xF0 | element]) + varint(size)
        return head + b"".join(_serialize_value(element, item) for item in values)
    return serialize(value) if value is not None else b""


def _integer(value: int) -> bytes:
    return varint((value << 1 if value >= 0 else (-value << 1) - 1) % 2**70)
