"""LabellingActor: holds the ensemble; makes and commits shards. A plain class, which ``ray_job`` makes remote.

Beside the models it holds the rows and labels of the shard in work and, while that is committed, its encoded files: never
more than two shards' worth, however many it has made.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import torch

from softlabel_schemas.commit import commit_shard
from softlabel_schemas.plan import ShardRange
from teacher_service.job import PreparedJob
from teacher_service.pipeline import label_shard
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
        self._seconds_done = 0.0
        # None while no shard is in work.
        self._last_activity: float | None = None

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
        """Label, store and commit one shard."""

        def on_seconds(seconds: float) -> None:
            self._seconds_done += seconds
            self._last_activity = time.monotonic()

        job = self._job
        self._last_activity = time.monotonic()
        try:
            rows = job.corpus.read(shard_range.first_row, shard_range.num_rows)
            spec, storage = job.document.spec, job.document.storage
            shard = label_shard(rows, self._teachers, spec, storage, on_seconds=on_seconds)
            record = commit_shard(self._store, job.document, shard_range, shard.utterances, shard.skipped)
        finally:
            self._last_activity = None
        return Receipt(num_frames=record.shard.num_frames, num_skipped=len(record.shard.skipped))

    def beat(self) -> Beat:
        """Answered by a thread of its own while a shard is made."""
        last = self._last_activity
        return Beat(seconds_done=self._seconds_done, idle_seconds=0.0 if last is None else time.monotonic() - last)
