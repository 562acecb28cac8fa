"""Where a run stands, from its listing alone: works while it runs, from any machine that can read the destination."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from softlabel_schemas import layout
from softlabel_schemas.commit import read_spec
from softlabel_schemas.errors import InputError
from softlabel_schemas.names import located
from softlabel_schemas.object_store import ObjectStore
from teacher_service.job_plan import Plan
from teacher_service.run_record import Actual, read_actual, read_plan

# The running rate is that of the latest commits.
_RECENT = 20
# While a run goes on, no gap between commits is so many times what the first one took, loading included.
_LONGEST_GAP = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """``shards_per_minute`` is over the last commits since the run paused; None before the second one.

    Attributes:
        plan: saved by ``teacher-service plan --save``; None without one.
        actual: what a planned dataset came to; None before it is published.
    """

    url: str
    fingerprint: str
    num_shards: int
    missing: tuple[int, ...]
    published: bool
    shards_per_minute: float | None
    seconds_since_last_commit: float | None
    plan: Plan | None = None
    actual: Actual | None = None

    @property
    def minutes_left(self) -> float | None:
        return len(self.missing) / self.shards_per_minute if self.shards_per_minute else None


def read_status(url: str) -> Status:
    """Of the run at a URL or a name. Raises InputError where none was begun there."""
    try:
        store = ObjectStore(located(url)[0])
    except InputError:
        # What is not published has no name, but may have a URL that looks like one.
        store = ObjectStore(url)
        if not store.exists(layout.SPEC):
            raise
    document = read_spec(store)
    listed = store.list(layout.COMMITS).items()
    done = {index: found.modified for key, found in listed if (index := layout.shard_index_of(key)) is not None}
    spec = store.list(layout.SPEC).get(layout.SPEC)
    recent = _since_pause(spec and spec.modified, sorted(done.values()))
    minutes = (recent[-1] - recent[0]).total_seconds() / 60 if len(recent) > 1 else 0.0
    num_shards, published = document.storage.num_shards, store.exists(layout.MANIFEST)
    plan = read_plan(store, document.spec.fingerprint())
    return Status(
        url=store.url,
        fingerprint=document.spec.fingerprint(),
        num_shards=num_shards,
        missing=tuple(index for index in range(num_shards) if index not in done),
        published=published,
        shards_per_minute=(len(recent) - 1) / minutes if minutes else None,
        seconds_since_last_commit=(datetime.now(UTC) - recent[-1]).total_seconds() if recent else None,
        plan=plan,
        # Worth a listing of the whole dataset only where there is something to compare with.
        actual=read_actual(store) if plan is not None and published else None,
    )


def _since_pause(begun: datetime | None, commits: Sequence[datetime]) -> Sequence[datetime]:
    """The last of ``commits``, ascending, without those before a night in which nothing ran: its hours are not the rate's.

    Actors that began together commit together, with gaps far above the others. A gap that is far above the time to the first
    commit, too, is a pause. Where that time is not known (copying changes it) nothing is left out.
    """
    recent = commits[-_RECENT:]
    first = (commits[0] - begun).total_seconds() if begun and commits else 0.0
    gaps = [(later - earlier).total_seconds() for earlier, later in itertools.pairwise(recent)]
    for index in reversed(range(len(gaps) if first > 0 else 0)):
        others = gaps[:index] + gaps[index + 1 :]
        usual = statistics.median_low(others) if others else 0.0
        if gaps[index] > _LONGEST_GAP * max(first, usual):
            return recent[index + 1 :]
    return recent


def ranges(indices: tuple[int, ...]) -> str:
    """``(0, 1, 2, 5)`` -> ``"0-2, 5"``."""
    parts: list[list[int]] = []
    for index in indices:
        if parts and index == parts[-1][1] + 1:
            parts[-1][1] = index
        else:
            parts.append([index, index])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)
