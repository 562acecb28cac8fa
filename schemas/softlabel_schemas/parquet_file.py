"""Parquet, as far as shards use it: flat columns in zstd-compressed PLAIN pages (FORMAT.md, section 8).

Shards are read by this module and not by a general Parquet library, because shards come from strangers: a general reader
allocates what a page header claims, follows ``ARROW:schema`` metadata and knows a dozen encodings, in some of which a few
bytes stand for billions of rows. Here each size is checked against the bytes that are there, or against a budget, before it is
used. Any Parquet library can still read the files.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from softlabel_schemas import zstd
from softlabel_schemas.limits import MAX_UTTERANCES_PER_SHARD, DecodingBudget
from softlabel_schemas.parquet_kernels import split_byte_arrays
from softlabel_schemas.strict import shortened
from softlabel_schemas.targets import offsets_of
from softlabel_schemas.thrift import Struct, read_struct

_MAGIC = b"PAR1"
_TYPES = {1: "INT32", 4: "FLOAT", 6: "BYTE_ARRAY"}
_DTYPES = {"INT32": np.dtype("<i4"), "FLOAT": np.dtype("<f4")}
_REQUIRED, _OPTIONAL = 0, 1
_UTF8 = 0
_ZSTD = 6
_DATA_PAGE, _PLAIN, _RLE = 0, 0, 3
# Of a million utterances in groups of 64: 15,625 groups of ten columns of some 40 values.
_MAX_FOOTER_VALUES = 8 << 20
_MAX_FOOTER_BYTES = 32 << 20
_MAX_PAGE_HEADER_VALUES = 64

Strings = tuple[memoryview, npt.NDArray[np.int64]]


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a shard: ``kind`` is INT32, FLOAT or BYTE_ARRAY, or STRING for UTF-8 text."""

    name: str
    kind: str
    optional: bool = False


class PageColumns(ABC):
    """Columns as pages, wherever these lie.

    Args:
        data: of the pages, perhaps among others; sets how much they may decompress to.
    """

    def __init__(self, data: bytes, expected: Sequence[Column]) -> None:
        self._data = memoryview(data)
        self._budget = DecodingBudget(len(data))
        self._expected = expected
        self._columns = {column.name: position for position, column in enumerate(expected)}

    def numbers(self, name: str) -> npt.NDArray[Any]:
        """A required column, int32 or float32 [N]."""
        dtype = _DTYPES[self._expected[self._columns[name]].kind]
        parts = [_numbers(page, count, dtype) for page, count in self._pages(name)]
        return np.concatenate([np.empty(0, dtype), *parts])

    def optional_floats(self, name: str) -> npt.NDArray[np.float32]:
        """An optional column, float32 [N], NaN for null."""
        parts = []
        for page, count in self._pages(name):
            present, values = _definition_levels(page, count)
            part = np.full(count, np.nan, dtype="<f4")
            part[present] = _numbers(values, int(present.sum()), part.dtype)
            parts.append(part)
        return np.concatenate([np.empty(0, "<f4"), *parts])

    def strings(self, name: str) -> Strings:
        """A required column of bytes: its values joined, and int64 [N + 1] offsets into them."""
        parts = [_byte_arrays(page, count) for page, count in self._pages(name)]
        lengths = np.concatenate([np.empty(0, np.int64), *(lengths for _, lengths in parts)])
        values = parts[0][0] if len(parts) == 1 else np.concatenate([np.empty(0, np.uint8), *(v for v, _ in parts)])
        return values.data, offsets_of(lengths)

    @abstractmethod
    def _pages(self, name: str) -> Iterator[tuple[memoryview, int]]:
        """The decompressed pages of a column, and the number of rows in each."""

    def _page(self, start: int, stop: int) -> tuple[memoryview, int, int]:
        """The page at ``start``: decompressed, its number of rows, and where the next one begins."""
        header, start = read_struct(self._data, start, stop, max_values=_MAX_PAGE_HEADER_VALUES)
        size, compressed = _field(header, 2, int), _field(header, 3, int)
        if compressed < 0 or size < 0 or start + compressed > stop:
            raise ValueError(f"a page of {compressed} bytes, {size} uncompressed, is not within its column chunk")
        payload = self._data[start : start + compressed]
        if 4 in header and zlib.crc32(payload) != _field(header, 4, int) & 0xFFFFFFFF:
            raise ValueError("a page does not have its checksum (CRC-32)")
        self._budget.spend(size)
        return (
            memoryview(zstd.decompress(payload, size) if size else b""),
            _page_rows(header),
            start + compressed,
        )


class ParquetColumns(PageColumns):
    """The columns of a file whose schema was found to be the expected one.

    Raises:
        ValueError: the file, its schema or its metadata are not those of a shard.
    """

    def __init__(self, data: bytes, expected: Sequence[Column]) -> None:
        super().__init__(data, expected)
        self._unread = len(data)
        footer = _read_footer(self._data)
        found = [_column(element) for element in _field(footer, 2, list)[1:]]
        if found != list(expected):
            raise SchemaError(found, expected)
        groups = [_checked(group, dict) for group in _field(footer, 4, list)]
        self._group_rows = [_field(group, 3, int) for group in groups]
        self.num_rows: int = _field(footer, 3, int)
        if min(self._group_rows, default=0) < 0 or sum(self._group_rows) != self.num_rows:
            raise ValueError(f"row groups of {self._group_rows[:3]}... rows are not {self.num_rows} rows")
        if self.num_rows > MAX_UTTERANCES_PER_SHARD:
            raise ValueError(f"{self.num_rows} rows are too many, expected at most {MAX_UTTERANCES_PER_SHARD}")
        self._chunks = [_field(group, 1, list) for group in groups]
        if any(len(chunks) != len(expected) for chunks in self._chunks):
            raise ValueError(f"a row group has not {len(expected)} columns")

    def _pages(self, name: str) -> Iterator[tuple[memoryview, int]]:
        position = self._columns[name]
        for rows, chunks in zip(self._group_rows, self._chunks, strict=True):
            yield from self._chunk_pages(_field(_checked(chunks[position], dict), 3, dict), rows)

    def _chunk_pages(self, metadata: Struct, rows: int) -> Iterator[tuple[memoryview, int]]:
        if metadata.get(4) != _ZSTD:
            raise ValueError(f"compression {shortened(metadata.get(4))} found, expected {_ZSTD} (zstd)")
        start, size = _field(metadata, 9, int), _field(metadata, 7, int)
        stop = start + size
        # A group of no rows has a chunk of no bytes, at 0.
        if not 0 <= start <= stop <= len(self._data) - 8:
            raise ValueError(f"a column chunk of {size} bytes at {start} is not within the file")
        # Chunks that share their bytes would make the time to read a file grow with its square.
        self._unread -= size
        if self._unread < 0:
            raise ValueError("column chunks overlap")
        while start < stop:
            page, count, start = self._page(start, stop)
            rows -= count
            if rows < 0:
                raise ValueError("the pages of a column chunk have more rows than the row group")
            yield page, count
        if rows:
            raise ValueError(f"the pages of a column chunk have {rows} rows fewer than the row group")


class RowGroup(PageColumns):
    """One row group from its bytes alone: its pages, column after column. Each column is read once, in order.

    Raises:
        ValueError: the bytes are not the pages of ``num_rows`` rows.
    """

    def __init__(self, data: bytes, num_rows: int, expected: Sequence[Column]) -> None:
        super().__init__(data, expected)
        if not 0 < num_rows <= MAX_UTTERANCES_PER_SHARD:
            raise ValueError(f"{num_rows} rows in a row group, expected 1 to {MAX_UTTERANCES_PER_SHARD}")
        self._pages_of: dict[str, list[tuple[memoryview, int]]] = {}
        start = 0
        for column in expected:
            pages, rows = self._pages_of.setdefault(column.name, []), num_rows
            while rows > 0:
                page, count, start = self._page(start, len(data))
                if not 0 < count <= rows:
                    raise ValueError(f"a page of column '{column.name}' has {count} rows, {rows} are left")
                pages.append((page, count))
                rows -= count
        if start != len(data):
            raise ValueError(f"{len(data) - start} bytes follow the last page")

    def _pages(self, name: str) -> Iterator[tuple[memoryview, int]]:
        yield from self._pages_of[name]


class SchemaError(ValueError):
    """The file has other columns."""

    def __init__(self, found: Sequence[Column | None], expected: Sequence[Column]) -> None:
        names = [f"{column.name:.40} {column.kind}" if column else "?" for column in found[: len(expected) + 1]]
        super().__init__(
            f"columns are {names}, expected those of FORMAT.md: {[f'{column.name} {column.kind}' for column in expected]}"
        )


def _read_footer(data: memoryview) -> Struct:
    if len(data) < 12 or data[:4] != _MAGIC or data[-4:] != _MAGIC:
        raise ValueError("it is not a Parquet file")
    size = int.from_bytes(data[-8:-4], "little")
    stop = len(data) - 8
    if size > min(stop - len(_MAGIC), _MAX_FOOTER_BYTES):
        raise ValueError(f"its footer claims {size} bytes of a file of {len(data)}")
    footer, _ = read_struct(data, stop - size, stop, max_values=_MAX_FOOTER_VALUES)
    if 8 in footer:
        raise ValueError("it is encrypted")
    return footer


def _column(element: Any) -> Column | None:
    """None for a column of no kind that shards have."""
    element = _checked(element, dict)
    name, number = _field(element, 4, bytes), element.get(1)
    kind = _TYPES.get(number) if type(number) is int else None
    repetition, is_group = element.get(3), bool(element.get(5))
    is_text = element.get(6) == _UTF8 or (isinstance(element.get(10), dict) and 1 in element[10])
    plain = element.keys() <= {1, 3, 4, 5, 9}
    if kind is None or is_group or repetition not in (_REQUIRED, _OPTIONAL):
        return None
    if not plain and not (kind == "BYTE_ARRAY" and is_text):
        return None
    return Column(
        name.decode(errors="replace"),
        kind if plain else "STRING",
        repetition == _OPTIONAL,
    )


def _page_rows(header: Struct) -> int:
    if header.get(1) != _DATA_PAGE:
        raise ValueError(
            f"a page of type {shortened(header.get(1))} found, expected {_DATA_PAGE} (data page, version 1)"
        )
    data_header = _field(header, 5, dict)
    if data_header.get(2) != _PLAIN:
        raise ValueError(f"a page in encoding {shortened(data_header.get(2))} found, expected {_PLAIN} (PLAIN)")
    if data_header.get(3) != _RLE:
        raise ValueError(f"levels in encoding {shortened(data_header.get(3))} found, expected {_RLE} (RLE)")
    count: int = _field(data_header, 1, int)
    if count < 0:
        raise ValueError(f"a page has {count} rows")
    return count


def _numbers(page: memoryview, count: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    if len(page) != count * dtype.itemsize:
        raise ValueError(f"a page of {count} numbers has {len(page)} bytes, expected {count * dtype.itemsize}")
    return np.frombuffer(page, dtype)


def _byte_arrays(page: memoryview, count: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """PLAIN: each value after its length in four bytes. The values joined, and their lengths."""
    if count * 4 > len(page):
        raise ValueError(f"{count} values are not in a page of {len(page)} bytes")
    data = np.frombuffer(page, np.uint8)
    values, lengths = np.empty(len(page) - 4 * count, np.uint8), np.empty(count, np.int64)
    if not split_byte_arrays(data, values, lengths):
        raise ValueError(f"the values of a page do not fill its {len(page)} bytes")
    return values, lengths


def _definition_levels(page: memoryview, count: int) -> tuple[npt.NDArray[np.bool_], memoryview]:
    """RLE and bit-packed runs of one-bit levels, after their length in four bytes: bool [count], and what follows."""
    stop = 4 + int.from_bytes(page[:4], "little")
    if stop > len(page):
        raise ValueError("definition levels are cut short")
    levels, values = page[4:stop], page[stop:]
    parts, filled = [], 0
    while filled < count:
        header, shift = 0, 0
        while True:
            if not len(levels) or shift > 28:
                raise ValueError("definition levels are cut short")
            header |= (levels[0] & 0x7F) << shift
            more, levels, shift = levels[0] & 0x80, levels[1:], shift + 7
            if not more:
                break
        # A bit-packed run has groups of eight levels, the last one filled up; the other kind repeats one level.
        num_bytes = header >> 1 if header & 1 else 1
        if header < 2 or len(levels) < num_bytes:
            raise ValueError("definition levels are cut short")
        left = count - filled
        run = np.frombuffer(levels[: min(num_bytes, -(-left // 8))], np.uint8)
        part = np.unpackbits(run, bitorder="little")[:left] if header & 1 else np.repeat(run, min(header >> 1, left))
        parts.append(part == 1)
        filled += len(part)
        levels = levels[num_bytes:]
    return np.concatenate([np.empty(0, bool), *parts]), values


def _field(struct: Struct, field_id: int, kind: type[Any]) -> Any:
    return _checked(struct.get(field_id), kind)


def _checked(value: Any, kind: type[Any]) -> Any:
    # A boolean is an int to Python, and is none to Parquet.
    if type(value) is not kind:
        raise ValueError(f"Parquet metadata has {type(value).__name__}, expected {kind.__name__}")
    return value
