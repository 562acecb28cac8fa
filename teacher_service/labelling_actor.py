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
from teacher_service.teacher import load_teacher


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
        idle_seconds: since the last batch or stored shard while one is in work; 0 where none is.
    """

    seconds_done: float
    idle_seconds: float


class LabellingActor:
    """Does nothing in ``__init__``, so that a bad bundle arrives as its own error and not as a dead actor."""

    def __init__(self, job: PreparedJob) -> None:
        self._job = job
        # The models are run by one thread at a time.
        self._models = threading.Lock()
        # Of what follows, which both threads of ``label`` and that of ``beat`` use.
        self._state = threading.Lock()
        self._seconds_done = 0.0
        self._shards_in_work = 0
        self._last_activity = 0.0

    def start(self) -> int:
        """The process id; answered once Ray has found room for the actor."""
        return os.getpid()

    def load(self) -> None:
        """Load the teachers. Raises InputError, IntegrityError, OSError."""
        config, job = self._job.config, self._job
        torch.set_num_threads(config.resources.cpus_per_actor)
        device = "cuda" if config.resources.gpus_per_actor > 0 else "cpu"
        self._teachers = [
            load_teacher(teacher, weight=member.weight, device=device, precision=config.resources.precision)
            for teacher, member in zip(config.teachers, job.document.spec.teachers, strict=True)
        ]
        self._store = job.store()

    def label(self, shard_range: ShardRange) -> Receipt:
        """Label, store and commit one shard. May be called again while it commits; then the next is labelled meanwhile."""
        with self._in_work():
            shard = self._labelled(shard_range)
            self._active()
            record = commit_shard(self._store, self._job.document, shard_range, shard.utterances, shard.skipped)
        return Receipt(num_frames=record.shard.num_frames, num_skipped=len(record.shard.skipped))

    def beat(self) -> Beat:
        """Answered by a thread of its own while a shard is made."""
        with self._state:
            idle_seconds = time.monotonic() - self._last_activity if self._shards_in_work else 0.0
            return Beat(seconds_done=self._seconds_done, idle_seconds=idle_seconds)

    def _labelled(self, shard_range: ShardRange) -> LabelledShard:
        def on_seconds(seconds: float) -> None:
            self._active(seconds)

        job = self._job
        # A thread that is new to torch would take another number, and round otherwise.
        torch.set_num_threads(job.config.resources.cpus_per_actor)
        rows = job.corpus.read(shard_range.first_row, shard_range.num_rows)
        spec, storage = job.document.spec, job.document.storage
        return label_shard(rows, self._teachers, spec, storage, on_seconds=on_seconds, models=self._models)

    @contextmanager
    def _in_work(self) -> Iterator[None]:
        with self._state:
            self._shards_in_work += 1
            # A second shard waits for the first: that it came is no progress.
            if self._shards_in_work == 1:
                self._last_activity = time.monotonic()
        try:
            yield
        finally:
            with self._state:
                self._shards_in_work -= 1
                self._last_activity = time.monotonic()

    def _active(self, seconds: float = 0.0) -> None:
        with self._state:
            self._seconds_done += seconds
            self._last_activity = time.monotonic()
