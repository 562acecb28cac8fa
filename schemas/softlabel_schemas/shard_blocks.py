"""Blocks of a shard: that each can be read by itself, and holds what the shard does there."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from softlabel_schemas.containers import Container
from softlabel_schemas.errors import IntegrityError
from softlabel_schemas.shard import ShardColumns
from softlabel_schemas.utterance_index import ShardIndex, block_digest


def check_index(
    index: ShardIndex, columns: ShardColumns, files: Mapping[str, bytes], container: Container, *, where: str
) -> None:
    """Check the index of a shard, whose ``columns`` were read from ``files``, against both.

    Raises:
        IntegrityError: a key is not that of its utterance, or a block is not what the index says.
    """
    if index.keys_N.tobytes() != ShardIndex.of(columns.utterance_ids, [], {}).keys_N.tobytes():
        raise IntegrityError(f"{where}: the shard's index has other keys than its utterances")
    first_row = 0
    for block in index.block_places():
        (data,) = (each[block.start : block.start + block.num_bytes] for each in files.values())
        here = f"{where}, block of rows {first_row} to {first_row + block.num_rows - 1}"
        if block_digest(data) != block.digest:
            raise IntegrityError(f"{here}: does not have the digest in the shard's index")
        found = container.decode_block(data, block.num_rows, tuple(columns.streams), where=here)
        if not _same_rows(found, columns, first_row):
            raise IntegrityError(f"{here}: holds other labels than the shard does")
        first_row += block.num_rows


def _same_rows(block: ShardColumns, shard: ShardColumns, first_row: int) -> bool:
    """Whether a block's columns are those of a shard from ``first_row`` on, bit for bit."""
    stop = first_row + len(block.utterance_ids)
    if block.utterance_ids != shard.utterance_ids[first_row:stop]:
        return False
    for name in ("num_frames", "num_entries", "kept_mass", "entropy", "agreement"):
        if getattr(block, name).tobytes() != getattr(shard, name)[first_row:stop].tobytes():
            return False
    for name, (data, offsets_N) in block.streams.items():
        whole, whole_offsets_N = shard.streams[name]
        own_N = whole_offsets_N[first_row : stop + 1]
        if not np.array_equal(offsets_N, own_N - own_N[0]) or data != whole[own_N[0] : own_N[-1]]:
            return False
    return True
