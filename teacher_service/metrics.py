"""Metrics of a run, through Ray's own API: each node's agent exports them to Prometheus, with ``ray_`` before the name and
``_total`` after a counter's. ``deploy/grafana/`` has a dashboard of them.

========================  =======  =========================================================================
softlabels_frames         counter  labelled; its rate is frames per second
softlabels_speech         counter  seconds of speech labelled
softlabels_padded         counter  seconds that the teachers were given for it; the rest is padding
softlabels_teacher_busy   counter  seconds in which an actor's device ran the teachers
softlabels_teacher_idle   counter  seconds since they were loaded in which it did not
softlabels_stored_bytes   counter  of committed shards
softlabels_retries        counter  shards that are to be made again
softlabels_shards         gauge    by ``state``: waiting, in_work, committed, given_up
========================  =======  =========================================================================

Each has the first 12 digits of the dataset's fingerprint as its tag ``fingerprint``. Where Ray was not started nothing is
exported.
"""

from __future__ import annotations

import time

from softlabel_schemas import ray_start  # noqa: F401

# Before Ray: it sets what Ray reads when it is imported.
# isort: split
from ray.util.metrics import Counter, Gauge

from softlabel_schemas.manifest import CommitRecord
from teacher_service.pipeline import BatchDone

STATES = ("waiting", "in_work", "committed", "given_up")


class ActorMetrics:
    """What one actor does, from when its teachers are loaded; not for several threads at once."""

    def __init__(self, fingerprint: str) -> None:
        self._frames = _counter("frames", "Frames labelled.", fingerprint)
        self._speech = _counter("speech", "Seconds of speech labelled.", fingerprint)
        self._padded = _counter("padded", "Seconds of padded speech that the teachers were given.", fingerprint)
        self._busy = _counter("teacher_busy", "Seconds in which the device ran the teachers.", fingerprint)
        self._idle = _counter("teacher_idle", "Seconds in which the device did not run them.", fingerprint)
        self._bytes = _counter("stored_bytes", "Bytes of committed shards.", fingerprint)
        self._began, self._busy_seconds, self._idle_seconds = time.monotonic(), 0.0, 0.0

    def batch_done(self, batch: BatchDone) -> None:
        self._busy_seconds += batch.teacher_seconds
        for counter, value in (
            (self._frames, batch.num_frames),
            (self._speech, batch.seconds),
            (self._padded, batch.padded_seconds),
            (self._busy, batch.teacher_seconds),
        ):
            _add(counter, value)
        self.tick()

    def committed(self, record: CommitRecord) -> None:
        _add(self._bytes, record.shard.num_bytes)

    def tick(self) -> None:
        """Time has passed. A batch is told of when the one after it has been run: until then its time counts as idle, so that
        the sum is ahead by two batches at most, and waits there."""
        idle = time.monotonic() - self._began - self._busy_seconds
        _add(self._idle, idle - self._idle_seconds)
        self._idle_seconds = max(self._idle_seconds, idle)


class RunMetrics:
    """What the driver knows of its shards."""

    def __init__(self, fingerprint: str) -> None:
        self._shards = Gauge("softlabels_shards", "Shards by state.", ("fingerprint", "state"))
        self._shards.set_default_tags({"fingerprint": fingerprint[:12]})
        self._retries = _counter("retries", "Shards that are to be made again.", fingerprint)
        self._num_retries = 0

    def update(self, shards: dict[str, int], num_retries: int) -> None:
        """``shards``: how many there are of each state; ``num_retries``: in all."""
        for state in STATES:
            self._shards.set(shards[state], {"state": state})
        _add(self._retries, num_retries - self._num_retries)
        self._num_retries = num_retries


def _counter(name: str, description: str, fingerprint: str) -> Counter:
    counter = Counter(f"softlabels_{name}", description, ("fingerprint",))
    return counter.set_default_tags({"fingerprint": fingerprint[:12]})


def _add(counter: Counter, value: float) -> None:
    """Ray refuses to add nothing."""
    if value > 0:
        counter.inc(value)
