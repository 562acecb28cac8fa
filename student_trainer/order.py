"""The order of training: pools of batches of corpus rows, a function of durations, seed and epoch alone; and who takes which
batch where several processes share an epoch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from softlabel_schemas.errors import InputError

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

    def pools(self, seconds_N: npt.NDArray[np.float64], epoch: int) -> Pools:
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


Pools = list[list[list[int]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """The part of an epoch that one process takes: as many batches one after the other as each of the others, so that it reads
    few pools, and the steps of its epoch are those. Of them a loader's worker makes every ``num_workers``-th."""

    rank: int = 0
    world_size: int = 1
    worker: int = 0
    num_workers: int = 1

    @property
    def is_all(self) -> bool:
        return self.world_size == self.num_workers == 1

    def pools(self, pools: Pools) -> Pools:
        """The process's batches; as many for each process."""
        evened = even_batches(pools, self.world_size)
        num_own = sum(map(len, evened)) // self.world_size
        own: Pools = []
        # Where its batches begin, counted from the pool.
        first = self.rank * num_own
        for pool in evened:
            own.append(pool[max(first, 0) : max(first + num_own, 0)])
            first -= len(pool)
        return own

    def makes(self, index: int) -> bool:
        """Whether the worker makes the step that is ``index`` behind the first to be done: DataLoader asks worker 0 first."""
        return index % self.num_workers == self.worker


def even_batches(pools: Pools, world_size: int) -> Pools:
    """The same rows in a number of batches that ``world_size`` divides, so that processes which wait for each other at every
    step end together: the batches with the most utterances are cut in half, each at most as long as it was.

    Raises:
        InputError: every batch is one utterance, and there is nothing left to cut.
    """
    even = [list(pool) for pool in pools]
    while sum(map(len, even)) % world_size:
        size, pool, index = max((len(batch), p, b) for p, batches in enumerate(even) for b, batch in enumerate(batches))
        if size == 1:
            raise InputError(
                f"{sum(map(len, even))} batches of one utterance each cannot be shared evenly by {world_size} processes; use "
                "fewer of them, or shorter utterances"
            )
        batch = even[pool][index]
        even[pool][index : index + 1] = [batch[: size // 2], batch[size // 2 :]]
    return even


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
