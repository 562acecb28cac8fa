"""CorpusFile: a corpus manifest of any size, read in bounded memory. What a job reads; a student takes ``load_corpus``.

    scan: every row, a block at a time -> digest, shard plan, digest of each block        read: the rows of one shard

Only a block is held in memory (:mod:`softlabel_schemas.corpus_blocks`). The corpus digest is over column after column: what it
needs of all rows waits in temporary files, about 100 bytes a row, and hard labels are read twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from softlabel_schemas.corpus import (
    DIGEST_PARTS,
    SEGMENT_PART,
    Corpus,
    check_splits,
    digest_head,
    has_start_samples,
    label_range,
    rows_of_splits,
    text_bytes,
    text_lengths,
)
from softlabel_schemas.corpus_blocks import ManifestFile
from softlabel_schemas.corpus_schema import NO_ROWS, SCHEMA, check_rows
from softlabel_schemas.errors import InputError
from softlabel_schemas.folds import SpeakerScan
from softlabel_schemas.plan import ShardPlanner, ShardRange
from softlabel_schemas.read_ahead import read_ahead
from softlabel_schemas.unique_ids import UniqueIds

_COPY_BYTES = 1 << 20

BlockT = TypeVar("BlockT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Some rows of the file.

    Attributes:
        position: of the block in its row group.
        num_rows: chosen ones.
        digest: sha256 over the chosen rows.
    """

    row_group: int
    position: int
    num_rows: int
    digest: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusScan:
    """What a job needs to know of the rows of the chosen splits; grows with shards and row groups, not with rows.

    Attributes:
        digest: equal to ``Corpus.digest`` of the same rows.
        label_range: the lowest and the highest hard label; None without any.
        seconds_of_shard: of each shard of ``plan``.
        speakers: of the chosen rows.
    """

    digest: str
    num_rows: int
    hard_label_frame_shift_ms: float | None
    inventory_digest: str | None
    label_range: tuple[int, int] | None
    plan: list[ShardRange]
    seconds_of_shard: list[float]
    blocks: tuple[Block, ...]
    speakers: SpeakerScan


class CorpusFile:
    """The rows of a corpus manifest that a job labels. Small, and can be sent to other processes.

    Args:
        splits: the rows of these; None for all.
    """

    def __init__(
        self,
        url: str | Path,
        splits: Sequence[str] | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.url = str(url)
        self.splits = None if splits is None else tuple(splits)
        self._storage_options = dict(storage_options or {})
        self._blocks: tuple[Block, ...] = ()

    def scan(self, shard_seconds: float) -> CorpusScan:
        """Read and check the whole file, and remember its blocks for :meth:`read`.

        Raises:
            InputError: as :func:`load_corpus` and ``select_splits``.
        """
        file = ManifestFile(self.url, self._storage_options)
        planner, known_splits, ranges = ShardPlanner(shard_seconds), set[str](), set[int]()
        speakers = SpeakerScan()
        blocks: list[Block] = []
        num_file_rows, has_segments = 0, False
        with contextlib.ExitStack() as temporary:
            # All but the hard labels themselves, the one part that would fill a disk.
            spilled = [temporary.enter_context(tempfile.TemporaryFile()) for _ in DIGEST_PARTS[:-1]]
            ids = temporary.enter_context(UniqueIds())
            for row_group, position, table in _ahead(_positions(file)):
                check_rows(table, where=self.url, first_row=num_file_rows)
                num_file_rows += len(table)
                ids.add(table["utterance_id"])
                known_splits.update(pc.unique(table["split"]).to_pylist())
                chosen = file.corpus(self._chosen(table))
                for (name, encode), part in zip(DIGEST_PARTS[:-1], spilled, strict=True):
                    part.write(encode(chosen.table[name]))
                planner.add(chosen.seconds())
                speakers.add(chosen.table)
                has_segments |= has_start_samples(chosen.table)
                ranges.update(label_range(chosen.table) or ())
                block = Block(
                    row_group=row_group, position=position, num_rows=len(chosen), digest=_block_digest(chosen)
                )
                blocks.append(block)
            if not num_file_rows:
                raise InputError(f"{self.url}: {NO_ROWS}")
            repeated = ids.first_repeated(table["utterance_id"] for table in file.all_blocks(["utterance_id"]))
            if repeated is not None:
                raise InputError(f"{self.url}: utterance_id '{repeated[0]}' occurs {repeated[1]} times")
            check_splits(self.splits or (), known_splits)
            num_rows = sum(block.num_rows for block in blocks)
            digest = digest_head(
                file.metadata.inventory_digest,
                file.metadata.hard_label_frame_shift_ms,
                num_rows,
                has_segments=has_segments,
            )
            for (name, _), part in zip(DIGEST_PARTS[:-1], spilled, strict=True):
                if name == SEGMENT_PART and not has_segments:
                    continue
                part.seek(0)
                while data := part.read(_COPY_BYTES):
                    digest.update(data)
        name, encode = DIGEST_PARTS[-1]
        for table in _ahead(file.all_blocks(["split", name])) if ranges else ():
            digest.update(encode(self._chosen(table)[name]))
        # Arrow would keep the blocks' memory for the life of the process.
        pa.default_memory_pool().release_unused()
        self._blocks = tuple(blocks)
        return CorpusScan(
            digest=digest.hexdigest(),
            num_rows=num_rows,
            hard_label_frame_shift_ms=file.metadata.hard_label_frame_shift_ms,
            inventory_digest=file.metadata.inventory_digest,
            label_range=(min(ranges), max(ranges)) if ranges else None,
            plan=planner.plan(),
            seconds_of_shard=planner.seconds_of_shard(),
            blocks=self._blocks,
            speakers=speakers,
        )

    def read(self, first_row: int, num_rows: int) -> Corpus:
        """Rows ``first_row`` to ``first_row + num_rows - 1`` of the chosen splits, as :meth:`scan` saw them.

        Raises:
            InputError: the file is not the one that was scanned.
        """
        starts = np.cumsum([0] + [block.num_rows for block in self._blocks])
        assert 0 <= first_row < first_row + num_rows <= starts[-1], "rows that scan found"
        # The blocks of the first and the last row.
        first, last = np.searchsorted(starts, [first_row, first_row + num_rows - 1], side="right") - 1
        file = ManifestFile(self.url, self._storage_options)
        tables = []
        for row_group, group in itertools.groupby(self._blocks[first : last + 1], key=lambda block: block.row_group):
            expected = list(group)
            if row_group >= file.num_row_groups:
                break
            # Of a row group with several blocks, those before are decoded and passed over.
            found = itertools.islice(file.blocks(row_group), expected[0].position, None)
            for block, table in zip(expected, found, strict=False):
                chosen = file.corpus(self._chosen(table))
                if _block_digest(chosen) == block.digest:
                    tables.append(chosen.table)
        rows = pa.concat_tables([SCHEMA.empty_table(), *tables]).slice(first_row - starts[first], num_rows)
        if len(tables) != last - first + 1:
            raise InputError(
                f"{self.url} changed while the job was running; give back the file that the job began with, or label the "
                "changed corpus into another destination"
            )
        return file.corpus(rows)

    def _chosen(self, table: pa.Table) -> pa.Table:
        return table if self.splits is None else rows_of_splits(table, self.splits)


def _positions(file: ManifestFile) -> Iterator[tuple[int, int, pa.Table]]:
    """Row group, position in it, and rows of each block."""
    for row_group in range(file.num_row_groups):
        yield from ((row_group, position, table) for position, table in enumerate(file.blocks(row_group)))


def _ahead(blocks: Iterator[BlockT]) -> Iterator[BlockT]:
    """The next block is decoded while one is hashed, which takes about as long: both leave Python to other threads."""
    for coming in read_ahead(lambda _: next(blocks, None), itertools.count(), num_parallel=1):
        block = coming.result()
        if block is None:
            return
        yield block


def _block_digest(corpus: Corpus) -> bytes:
    """Over all that labelling reads of these rows: what the corpus digest is over, locations and speakers."""
    digest = hashlib.sha256(corpus.digest.encode())
    for name in ("audio", "features", "speaker"):
        digest.update(text_lengths(corpus.table[name]))
        digest.update(text_bytes(corpus.table[name]))
    for name in ("audio_offset", "audio_bytes"):
        digest.update(pc.fill_null(corpus.table[name], -1).to_numpy().astype("<i8").data)
    return digest.digest()
