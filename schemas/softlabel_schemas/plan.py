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


class ShardPlanner:
    """Cuts after the utterance that fills a shard to ``shard_seconds``; keeps the shards, not the utterances.

    The cut is made on the running total in float64, so that it is vectorised: an utterance belongs to the shard in which it
    starts. The total is carried from one run of rows to the next, so the cut does not depend on how the rows are handed over.
    """

    def __init__(self, shard_seconds: float) -> None:
        self._shard_seconds = shard_seconds
        self._num_rows = 0
        self._total = 0.0
        self._last_shard = -1
        self._first_rows: list[int] = []
        self._seconds: list[float] = []

    def add(self, seconds_N: npt.NDArray[np.floating]) -> None:
        """The next rows' durations, [N]."""
        if not len(seconds_N):
            return
        # A cumulative sum adds one after the other, so that it can be taken up where it was left.
        totals_N = np.cumsum(np.concatenate([[self._total], seconds_N]), dtype=np.float64)[1:]
        shard_of_N = np.floor((totals_N - seconds_N) / self._shard_seconds).astype(np.int64)
        firsts = np.flatnonzero(np.diff(shard_of_N, prepend=self._last_shard))
        if len(firsts) == 0 or firsts[0] != 0:
            self._seconds[-1] += float(seconds_N[: firsts[0] if len(firsts) else None].sum())
        self._first_rows += (firsts + self._num_rows).tolist()
        if len(firsts):
            self._seconds += np.add.reduceat(seconds_N, firsts).tolist()
        self._num_rows += len(seconds_N)
        self._total, self._last_shard = float(totals_N[-1]), int(shard_of_N[-1])

    def plan(self) -> list[ShardRange]:
        """The shards of the rows so far."""
        ends = [*self._first_rows[1:], self._num_rows]
        return [
            ShardRange(index=index, first_row=first, num_rows=end - first)
            for index, (first, end) in enumerate(zip(self._first_rows, ends, strict=False))
        ]

    def seconds_of_shard(self) -> list[float]:
        return list(self._seconds)


def plan_shards(seconds_N: npt.NDArray[np.floating], shard_seconds: float) -> list[ShardRange]:
    """The plan for all utterances at once, from the duration of each, [N]; a function of its arguments alone."""
    planner = ShardPlanner(shard_seconds)
    planner.add(seconds_N)
    return planner.plan()
