"""The order of training: pools of batches of corpus rows, a function of durations, seed and epoch alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# A pool is made of this many runs of consecutive rows, so that it touches few shards.
_BLOCKS_PER_POOL = 8
# Random change of the lengths that batches are sorted by: neighbours in length, but not the same ones every epoch.
_LENGTH_JITTER = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """Attributes:
    batch_seconds: padded speech in a batch.
    pool_seconds: speech shuffled together.
    """

    seed: int
    batch_seconds: float
    pool_seconds: float

    def pools(self, seconds_N: npt.NDArray[np.float64], epoch: int) -> list[list[list[int]]]:
        """Pools of batches of rows, every row once: a function of its arguments alone."""
        rng = np.random.default_rng([self.seed, epoch])
        starts_N = np.cumsum(seconds_N) - seconds_N
        block_of_N = np.floor(starts_N / (self.pool_seconds / _BLOCKS_PER_POOL)).astype(np.int64)
        blocks = np.split(np.arange(len(seconds_N)), np.flatnonzero(np.diff(block_of_N)) + 1)
        order = rng.permutation(len(blocks))
        pools = [
            np.concatenate([blocks[index] for index in order[start : start + _BLOCKS_PER_POOL]])
            for start in range(0, len(blocks), _BLOCKS_PER_POOL)
        ]
        return [_batches(pool, seconds_N, self.batch_seconds, rng) for pool in pools]


def _batches(
    rows: npt.NDArray[np.int64], seconds_N: npt.NDArray[np.float64], batch_seconds: float, rng: np.random.Generator
) -> list[list[int]]:
    jitter = rng.uniform(1 - _LENGTH_JITTER, 1 + _LENGTH_JITTER, len(rows))
    batches: list[list[int]] = [[]]
    longest = 0.0
    for row in rows[np.argsort(seconds_N[rows] * jitter, kind="stable")]:
        longest = max(longest, seconds_N[row])
        if batches[-1] and longest * (len(batches[-1]) + 1) > batch_seconds:
            batches.append([])
            longest = seconds_N[row]
        batches[-1].append(int(row))
    return [batches[index] for index in rng.permutation(len(batches))]
