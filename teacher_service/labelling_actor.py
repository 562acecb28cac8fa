"""LabellingActor: holds the ensemble; makes and commits shards. A plain class, which ``ray_job`` makes remote.

``label`` may run in two threads: one shard is labelled while the one before it is encoded, uploaded and committed. Beside the
models the actor holds the rows and labels of the first, the labels and encoded files of the second: never more than two shards,
however many it has made.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from softlabel_schemas.commit import commit_shard
from softlabel_schemas.plan import ShardRange
from teacher_service.job import PreparedJob
from teacher_service.pipeline import LabelledShard, label_shard
from teacher_service.teacher import Teacher, load_teacher


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """All that an actor sends back for a shard."""

    num_frames: int
    num_skipped: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """A sign of life.

    Attributes:
        seconds_done: speech labelled so far.
        idle_seconds: since the last sign of life of the shard in work that has been still for longest: since its last batch, or
            since it began to be stored; 0 where none is in work. A shard that waits for the models is not in work.
    """

    seconds_done: float
    idle_seconds: float


def load_ensemble(job: PreparedJob) -> list[Teacher]:
    """The teachers of a job, on the device that it asks for. Raises InputError, IntegrityError, OSError."""
    device = "cuda" if job.config.resources.gpus_per_actor > 0 else "cpu"
    return [
        load_teacher(teacher, weight=member.weight, device=device, precision=job.config.resources.precision)
        for teacher, member in zip(job.config.teachers, job.document.spec.teachers, strict=True)
    ]


class LabellingActor:
    """Does nothing in ``__init__``, so that a bad bundle arrives as its own error and not as a dead actor."""

    def __init__(self, job: PreparedJob) -> None:
        self._job = job
        # The models are run by one thread at a time.
        self._models = threading.Lock()
        # Of what follows, which both threads of ``label`` and that of ``beat`` use.
        self._state = threading.Lock()
        self._seconds_done = 0.0
        # By shard in work: one that is stuck shows even while the other gets on.
        self._last_activity: dict[int, float] = {}

    def start(self) -> int:
        """The process id; answered once Ray has found room for the actor."""
        return os.getpid()

    def load(self) -> None:
        """Load the teachers. Raises InputError, IntegrityError, OSError."""
        torch.set_num_threads(self._job.config.resources.cpus_per_actor)
        self._teachers = load_ensemble(self._job)
        self._store = self._job.store()

    def label(self, shard_range: ShardRange) -> Receipt:
        """Label, store and commit one shard. May be called again while it commits; then the next is labelled meanwhile."""
        try:
            self._active(shard_range)
            shard = self._labelled(shard_range)
            self._active(shard_range)
            record = commit_shard(self._store, self._job.document, shard_range, shard.utterances, shard.skipped)
        finally:
            with self._state:
                self._last_activity.pop(shard_range.index, None)
        return Receipt(num_frames=record.shard.num_frames, num_skipped=len(record.shard.skipped))

    def beat(self) -> Beat:
        """Answered by a thread of its own while a shard is made."""
        with self._state:
            now = time.monotonic()
            idle_seconds = now - min(self._last_activity.values(), default=now)
            return Beat(seconds_done=self._seconds_done, idle_seconds=idle_seconds)

    def _labelled(self, shard_range: ShardRange) -> LabelledShard:
        def on_seconds(seconds: float) -> None:
            self._active(shard_range, seconds)

        job = self._job
        # A thread that is new to torch would take another number, and round otherwise.
        torch.set_num_threads(job.config.resources.cpus_per_actor)
        rows = job.corpus.read(shard_range.first_row, shard_range.num_rows)
        spec, storage = job.document.spec, job.document.storage
        return label_shard(
            rows, self._teachers, spec, storage, on_seconds=on_seconds, models=self._models_for(shard_range)
        )

    @contextmanager
    def _models_for(self, shard_range: ShardRange) -> Iterator[None]:
        with self._state:
            self._last_activity.pop(shard_range.index, None)
        with self._models:
            self._active(shard_range)
            yield

    def _active(self, shard_range: ShardRange, seconds: float = 0.0) -> None:
        with self._state:
            self._seconds_done += seconds
            self._last_activity[shard_range.index] = time.monotonic()
