"""LabellingActor: holds the ensemble; makes and commits shards. A plain class, which ``ray_job`` makes remote.

``label`` may run in two threads: one shard is labelled while the one before it is encoded, uploaded and committed. Beside the
models the actor holds the rows and labels of the first, the labels and encoded files of the second: never more than two shards,
however many it has made.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from softlabel_schemas import layout
from softlabel_schemas.commit import commit_shard
from softlabel_schemas.corpus import Corpus
from softlabel_schemas.errors import InputError, NotHereError
from softlabel_schemas.object_store import ObjectStore
from softlabel_schemas.plan import ShardRange
from teacher_service.job import PreparedJob, max_skipped
from teacher_service.logs import ActorLog, start_logging
from teacher_service.metrics import ActorMetrics
from teacher_service.pipeline import BatchDone, LabelledShard, folds, label_shard
from teacher_service.teacher import load_teachers

# Utterances of a fold that are labelled, about, to see whether its teachers work.
_CONTROLS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """All that an actor sends back for a shard."""

    num_frames: int
    num_skipped: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """A sign of life.

    Attributes:
        seconds_done: speech labelled so far, without that of shards that failed, which is labelled once more.
        idle_seconds: since the last sign of life of the shard in work that has been still for longest: since its last batch, or
            since it began to be stored; 0 where none is in work. A shard that waits for the models is not in work.
    """

    seconds_done: float
    idle_seconds: float


class LabellingActor:
    """Does nothing in ``__init__``, so that a bad bundle arrives as its own error and not as a dead actor."""

    def __init__(self, job: PreparedJob) -> None:
        self._job = job
        self._log = ActorLog(job.document.spec.fingerprint())
        # The models are run by one thread at a time.
        self._models = threading.Lock()
        # Of what follows, which both threads of ``label`` and that of ``beat`` use.
        self._state = threading.Lock()
        self._seconds_done = 0.0
        # By shard in work: one that is stuck shows even while the other gets on, and one that fails counts for nothing.
        self._last_activity: dict[int, float] = {}
        self._seconds_of_shard: dict[int, float] = {}

    def start(self) -> str:
        """The machine's name; answered once Ray has found room for the actor, whose process this is."""
        start_logging()
        return socket.gethostname()

    def load(self) -> None:
        """Load the teachers. Raises InputError, IntegrityError, and OSError where this machine does not see the run or
        lacks a package."""
        job, began = self._job, time.monotonic()
        with _on_this_machine():
            self._store = job.store()
            _check_begun(self._store)
            self._teachers = load_teachers(job.config, job.document.spec)
        self._metrics = ActorMetrics(job.document.spec.fingerprint())
        self._log.info("teachers loaded", teachers=len(self._teachers), seconds=_seconds_since(began))
        if any(teacher.emulates_bfloat16 for teacher in self._teachers):
            self._log.warning(
                'resources.precision is "bfloat16", without instructions for it here: "float32" is many times faster'
            )

    def label(self, shard_range: ShardRange) -> Receipt:
        """Label, store and commit one shard. May be called again while it commits; then the next is labelled meanwhile."""
        began = time.monotonic()
        try:
            self._active(shard_range)
            with _on_this_machine():
                shard = self._labelled(shard_range)
            self._active(shard_range)
            _check_skipped(self._job, shard_range, shard)
            record = commit_shard(self._store, self._job.document, shard_range, shard.utterances, shard.skipped)
        except Exception as error:
            with self._state:
                self._seconds_done -= self._seconds_of_shard.get(shard_range.index, 0.0)
            self._log.error("shard failed", shard=shard_range.index, error=f"{type(error).__name__}: {error}")
            raise
        finally:
            with self._state:
                self._last_activity.pop(shard_range.index, None)
                self._seconds_of_shard.pop(shard_range.index, None)
        with self._state:
            self._metrics.committed(record)
        receipt = Receipt(num_frames=record.shard.num_frames, num_skipped=len(record.shard.skipped))
        self._log.info(
            "shard committed",
            shard=shard_range.index,
            frames=receipt.num_frames,
            skipped=receipt.num_skipped,
            bytes=record.shard.num_bytes,
            seconds=_seconds_since(began),
        )
        return receipt

    def beat(self) -> Beat:
        """Answered by a thread of its own while a shard is made."""
        with self._state:
            self._metrics.tick()
            now = time.monotonic()
            idle_seconds = now - min(self._last_activity.values(), default=now)
            return Beat(seconds_done=self._seconds_done, idle_seconds=idle_seconds)

    def _labelled(self, shard_range: ShardRange) -> LabelledShard:
        def on_batch(batch: BatchDone) -> None:
            self._active(shard_range, batch.seconds)
            with self._state:
                self._metrics.batch_done(batch)

        def check(shard: LabelledShard) -> None:
            _check_found(shard)
            self._check_teachers(shard_range, shard)

        job = self._job
        # A thread that is new to torch would take another number, and round otherwise.
        torch.set_num_threads(job.config.resources.cpus_per_actor)
        rows = job.corpus.read(shard_range.first_row, shard_range.num_rows)
        spec, storage, models = job.document.spec, job.document.storage, self._models_for(shard_range)
        return label_shard(rows, self._teachers, spec, storage, on_batch=on_batch, models=models, check=check)

    def _check_teachers(self, shard_range: ShardRange, shard: LabelledShard) -> None:
        """Raises RuntimeError where the models of a fold have failed on all of its utterances, and are not seen to work here on
        those of other shards, or do on longer ones: the machine may lack memory, or a package, and the shard is tried again."""
        if not shard.unproven:
            return
        spec = self._job.document.spec
        # One that cannot be labelled shows nothing.
        storage = self._job.document.storage.model_copy(update={"on_error": "skip"})
        num_folds = spec.num_folds
        controls = [(rows, folds(rows, num_folds)[0]) for rows in self._other_rows(shard_range, num_folds or 1)]
        unproven, working = shard.unproven, set[int | None]()
        if shard.utterances:
            # That the others of the shard were labelled must do for a fold that is nowhere else.
            unproven = {fold: seconds for fold, seconds in unproven.items() if fold in {each for _, each in controls}}
        # Longest first: of memory, shorter ones show less.
        for rows, fold in sorted(controls, key=lambda control: -control[0].seconds()[0]):
            is_longer = rows.seconds()[0] >= unproven.get(fold, 0.0)
            if fold not in unproven or (fold in working and not is_longer):
                continue
            if label_shard(rows, self._teachers, spec, storage, models=self._models_for(shard_range)).utterances:
                if is_longer:
                    break
                working.add(fold)
        else:
            if working == unproven.keys():
                return
        raise RuntimeError(
            f"{shard.skipped[0].reason}; whether it is at fault or this machine is not clear: no utterance that the same "
            "teachers label shows that they work here, with memory enough"
        )

    def _other_rows(self, shard_range: ShardRange, num_folds: int) -> list[Corpus]:
        """Some of other shards, far from each other."""
        num_rows = self._job.document.storage.num_rows
        own = range(shard_range.first_row, shard_range.first_row + shard_range.num_rows)
        spread = np.linspace(0, num_rows - 1, min(num_rows, _CONTROLS * num_folds)).astype(int).tolist()
        return [self._job.corpus.read(row, 1) for row in spread if row not in own]

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
            self._seconds_of_shard[shard_range.index] = self._seconds_of_shard.get(shard_range.index, 0.0) + seconds
            self._last_activity[shard_range.index] = time.monotonic()


@contextmanager
def _on_this_machine() -> Iterator[None]:
    """Raises OSError for what this machine does not see, or lacks a package for: who prepared the job has read it."""
    try:
        yield
    except NotHereError as error:
        raise OSError(f"on this machine: {error}") from None


def _check_begun(store: ObjectStore) -> None:
    """Raises OSError where the destination is not the one that the driver has begun a run at, but a disk of this machine's
    own or another server: shards committed there would be missed when all are made. Another machine may have the right one.
    """
    if not store.exists(layout.SPEC):
        raise OSError(
            f"the run that was begun at {store.url} cannot be seen from this machine: a destination must be storage that all "
            "nodes share, at the same endpoint (AWS_ENDPOINT_URL) where it is S3"
        )


def _check_found(shard: LabelledShard) -> None:
    """Raises OSError where none of the files is there, so that the shard is tried again elsewhere: what is skipped is skipped
    for good, and a machine without the storage that they lie on would leave out all that it is given."""
    if shard.num_missing and shard.num_missing == len(shard.utterances) + len(shard.skipped):
        raise OSError(
            f"{shard.skipped[0].reason}, nor do the files of the other {shard.num_missing - 1} utterances of the shard; this "
            "machine may lack the storage that they lie on; if they are gone for good, take them out of the corpus manifest"
        )


def _check_skipped(job: PreparedJob, shard_range: ShardRange, shard: LabelledShard) -> None:
    """Raises InputError where the shard alone leaves out more than the job may: once it is committed it is not made again."""
    if len(shard.skipped) > max_skipped(job):
        raise InputError(
            f"{len(shard.skipped)} of the {shard_range.num_rows} utterances of shard {shard_range.index} cannot be labelled, "
            f"more than errors.max_skipped_fraction = {job.config.errors.max_skipped_fraction:g} allows of all "
            f"{job.document.storage.num_rows}; the first: {shard.skipped[0].reason}; nothing of the shard is stored"
        )


def _seconds_since(began: float) -> float:
    return round(time.monotonic() - began, 3)
