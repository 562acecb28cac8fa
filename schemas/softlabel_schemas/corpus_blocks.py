"""ManifestFile: the rows of a corpus manifest, a block at a time.

A *block* is a run of rows of one Parquet row group: at most 4,096, and fewer where hard labels are long. Where a block ends is
a function of the file, so that two processes agree on it. No more of the file than a row group of ``write_corpus`` is held.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from softlabel_schemas.corpus import Corpus, split_url
from softlabel_schemas.corpus_schema import ROWS_PER_GROUP, checked_types, read_metadata
from softlabel_schemas.errors import InputError, NotHereError
from softlabel_schemas.object_store import ObjectStore

# 16 MB in memory.
_LABELS_PER_BLOCK = 4 << 20
# What is read of a row group is fetched by one request up to this size, and bit by bit beyond.
_MAX_FETCH_BYTES = 64 << 20
_BUFFER_BYTES = 1 << 20


class ManifestFile:
    """Open as long as it is referred to; holds no connection.

    Raises:
        InputError: as :func:`load_corpus`, whichever method finds it.
    """

    def __init__(self, url: str, storage_options: Mapping[str, Any]) -> None:
        self.url = url
        self._base_url, name = split_url(url)
        try:
            self._file = RangeFile(ObjectStore(self._base_url, storage_options), name)
        except FileNotFoundError:
            raise NotHereError(f"corpus manifest {url} does not exist") from None
        with self._readable():
            self._parquet = pq.ParquetFile(
                self._file, buffer_size=_BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True
            )
        self.metadata = read_metadata(self._parquet.schema_arrow, where=url)
        self.num_row_groups: int = self._parquet.num_row_groups

    def blocks(self, row_group: int, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The blocks of a row group in order, their types checked; some of the columns, or all."""
        group = self._parquet.metadata.row_group(row_group)
        chunks = [group.column(index) for index in range(group.num_columns)]
        wanted = [c for c in chunks if columns is None or c.path_in_schema.split(".")[0] in columns]
        num_labels = sum(c.num_values for c in chunks if c.path_in_schema.split(".")[0] == "hard_labels")
        rows_per_block = min(max(_LABELS_PER_BLOCK * group.num_rows // max(num_labels, 1), 1), ROWS_PER_GROUP)
        starts = [min(filter(None, (c.dictionary_page_offset, c.data_page_offset))) for c in wanted]
        stop = max(start + c.total_compressed_size for start, c in zip(starts, wanted, strict=True))
        with self._readable():
            if stop - min(starts) <= _MAX_FETCH_BYTES:
                self._file.fetch(min(starts), stop)
            pending: list[pa.RecordBatch] = []
            left = group.num_rows
            for batch in self._parquet.iter_batches(
                rows_per_block, row_groups=[row_group], columns=columns and list(columns), use_threads=False
            ):
                # Arrow may cut a block where a column has more than 2 GB.
                pending.append(batch)
                if (found := sum(map(len, pending))) == min(rows_per_block, left):
                    yield checked_types(pa.Table.from_batches(pending), self.metadata, where=self.url)
                    pending, left = [], left - found

    def all_blocks(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        for row_group in range(self.num_row_groups):
            yield from self.blocks(row_group, columns)

    def corpus(self, table: pa.Table) -> Corpus:
        """Rows of this file as a corpus."""
        return Corpus(
            table,
            hard_label_frame_shift_ms=self.metadata.hard_label_frame_shift_ms,
            inventory_digest=self.metadata.inventory_digest,
            base_url=self._base_url,
        )

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            if self._file.error is not None:
                # The storage's fault, not that of the bytes.
                raise self._file.error from None
            raise InputError(f"{self.url} is not a readable Parquet file: {error}") from None


class RangeFile(io.RawIOBase):
    """An object as a file to read from, by range requests; one range can be fetched beforehand.

    Attributes:
        error: of the storage, which Arrow may have turned into one of its own.
    """

    def __init__(self, store: ObjectStore, key: str) -> None:
        super().__init__()
        self._store, self._key, self._size = store, key, store.size(key)
        self._position = self._fetched_from = 0
        self._fetched = b""
        self.error: Exception | None = None

    def fetch(self, start: int, stop: int) -> None:
        # Not both the old and the new range at once.
        self._fetched = b""
        self._fetched, self._fetched_from = self._read_range(start, stop), start

    def read(self, size: int | None = -1, /) -> bytes:
        start = self._position
        stop = self._size if size is None or size < 0 else min(start + size, self._size)
        offset = start - self._fetched_from
        if offset >= 0 and stop - self._fetched_from <= len(self._fetched):
            data = self._fetched[offset : stop - self._fetched_from]
        else:
            data = self._read_range(start, stop)
        self._position += len(data)
        return data

    def readinto(self, buffer: Any, /) -> int:
        """What ``io.BufferedReader`` reads by."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _read_range(self, start: int, stop: int) -> bytes:
        try:
            return self._store.read_range(self._key, start, stop)
        except Exception as error:
            self.error = error
            raise

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._position = offset + (0, self._position, self._size)[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True
