"""The cut of a corpus into shards: contiguous runs of rows, by duration."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRange:
    """Rows ``first_row`` to ``first_row + num_rows - 1`` of the corpus."""

    index: int
    first_row: int
    num_rows: int


def plan_shards(seconds_N: npt.NDArray[np.floating], shard_seconds: float) -> list[ShardRange]:
    """Cut after the utterance that fills a shard to ``shard_seconds``; a function of its arguments alone.

    Args:
        seconds_N: duration of each utterance, [N].

    The cut is made on the running total, so that it is vectorised: an utterance belongs to the shard in which it starts.
    """
    starts_N = np.cumsum(seconds_N, dtype=np.float64) - seconds_N
    shard_of_N = np.floor(starts_N / shard_seconds).astype(np.int64)
    first_rows = np.flatnonzero(np.diff(shard_of_N, prepend=-1))
    ends = np.append(first_rows[1:], len(shard_of_N))
    return [
        ShardRange(index=index, first_row=int(first), num_rows=int(end - first))
        for index, (first, end) in enumerate(zip(first_rows, ends, strict=True))
    ]
