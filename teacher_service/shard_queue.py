"""ShardQueue: which shard is made next, and when a failing one is given up. Knows nothing of Ray.

A failed shard waits for a random pause that grows with its attempts ("full jitter"), so that a destination in trouble is not
hammered. It goes to a machine that it has not failed on, while there is one: a machine without a mount, say, fails every shard
that it is given, and soon asks for the next. A shard that fails three times is given up and reported, while the others are
made; a machine that has failed the one before, too, says nothing of a shard, where there are others that have not.

Where nothing succeeds any more, the fault is not in a shard: the queue ends the job before more labelling is wasted on a full
or forbidden destination. One machine of several cannot bring that about.
"""

from __future__ import annotations

import heapq
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence, Set

from softlabel_schemas.plan import ShardRange

MAX_ATTEMPTS = 3
# A lost actor (a reclaimed machine, a killed process) is seldom the fault of the shard it was making.
MAX_LOSSES = 10
# In a row, with no shard made in between; more where there are many actors, since an outage fails all of their shards at once.
# Each machine counts for no more than an equal share.
_MAX_IN_A_ROW, _MAX_IN_A_ROW_PER_ACTOR = 12, 3
# Of each machine that is there, where another that has failed less was lost.
_MAX_OF_EACH = 4
_FIRST_PAUSE_SECONDS = 2.0
_LONGEST_PAUSE_SECONDS = 60.0


class GaveUpError(RuntimeError):
    """Shards could not be made; what was committed stays, and the same job resumes."""


class ShardQueue:
    """The shards of a run that are not made yet.

    Args:
        num_actors: that make them.
        clock: seconds; a test's own.

    Attributes:
        machines: the names of those that shards are made on, or are about to be; whoever asks for shards keeps it.
    """

    def __init__(
        self,
        shards: Sequence[ShardRange],
        *,
        num_actors: int = 1,
        seed: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        # (not before, index): in order, failed ones later.
        self._waiting = [(0.0, shard.index, shard) for shard in shards]
        heapq.heapify(self._waiting)
        self._clock, self._rng = clock, random.Random(seed)  # noqa: S311 - pauses, not secrets
        self._attempts, self._losses = Counter[int](), Counter[int]()
        self._failed_on: dict[int, set[str]] = {}
        self._max_in_a_row = max(_MAX_IN_A_ROW, _MAX_IN_A_ROW_PER_ACTOR * num_actors)
        # By machine, since any of them made a shard; and since it did.
        self._in_a_row, self._own_in_a_row = Counter[str](), Counter[str]()
        self.machines: Set[str] = frozenset()
        self.num_done = 0
        self.num_retries = 0
        self.given_up: dict[int, str] = {}

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def next(self, machine: str = "") -> ShardRange | None:
        """A shard for ``machine`` to make now; None where all that are left still pause, or are for other machines."""
        passed, found = [], None
        while found is None and self._waiting and self._waiting[0][0] <= self._clock():
            item = heapq.heappop(self._waiting)
            if self._is_for(machine, item[2]):
                found = item[2]
            else:
                passed.append(item)
        for item in passed:
            heapq.heappush(self._waiting, item)
        return found

    def _is_for(self, machine: str, shard: ShardRange) -> bool:
        failed_on = self._failed_on.get(shard.index, set())
        return machine not in failed_on or self.machines <= failed_on

    def done(self, machine: str = "") -> None:
        self.num_done += 1
        self._in_a_row.clear()
        del self._own_in_a_row[machine]

    def put_back(self, shard: ShardRange) -> None:
        """Not attempted: it was waiting for an actor that died."""
        heapq.heappush(self._waiting, (0.0, shard.index, shard))

    def lost(self, shard: ShardRange, reason: str, machine: str = "") -> None:
        """The actor that made it on ``machine`` died or was stuck. Raises GaveUpError as :meth:`failed`."""
        self._losses[shard.index] += 1
        self._again(shard, reason, machine, self._losses[shard.index], MAX_LOSSES)

    def failed(self, shard: ShardRange, reason: str, machine: str = "") -> None:
        """Raises GaveUpError where nothing has succeeded for too many failures and losses in a row, on all machines."""
        if not self._is_suspect(machine):
            self._attempts[shard.index] += 1
        self._again(shard, reason, machine, self._attempts[shard.index], MAX_ATTEMPTS)

    def _is_suspect(self, machine: str) -> bool:
        """Whether it fails one shard after the other, and others do not."""
        return self._own_in_a_row[machine] > 0 and any(not self._own_in_a_row[other] for other in self.machines)

    def _again(self, shard: ShardRange, reason: str, machine: str, count: int, limit: int) -> None:
        self._failed_on.setdefault(shard.index, set()).add(machine)
        self._in_a_row[machine] += 1
        self._own_in_a_row[machine] += 1
        # In parts of a failure, so that shares are whole numbers. Of those that were lost, too: the others may be back soon.
        num_machines = len(self.machines | self._in_a_row.keys())
        counted = sum(min(own * num_machines, self._max_in_a_row) for own in self._in_a_row.values())
        # One that is lost for good cannot fail any more: of those that are there, each by itself is then enough.
        own = min((self._in_a_row[each] for each in self.machines), default=0)
        if counted >= self._max_in_a_row * num_machines or own >= _MAX_OF_EACH * self._max_in_a_row:
            raise GaveUpError(
                f"stopped: the last {self._in_a_row.total()} attempts at shards all failed, the last one: {reason}"
            )
        if count >= limit:
            self.given_up[shard.index] = reason
            return
        self.num_retries += 1
        heapq.heappush(self._waiting, (self._clock() + self.pause(max(count, 1)), shard.index, shard))

    def pause(self, count: int) -> float:
        """Seconds before the ``count``-th repetition: random, up to a bound that doubles each time ("full jitter")."""
        return self._rng.uniform(0, min(_LONGEST_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS * 2.0 ** min(count - 1, 10)))

    def check(self) -> None:
        """Raises GaveUpError naming each shard that was given up, with its last error."""
        if self.given_up:
            listed = "\n".join(f"  shard {index}: {reason}" for index, reason in sorted(self.given_up.items()))
            raise GaveUpError(
                f"{len(self.given_up)} shards were given up after repeated failures, the others are done:\n{listed}"
            )
