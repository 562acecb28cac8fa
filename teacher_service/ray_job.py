"""Run a job on Ray: actors that each hold the ensemble, a bounded number of shards in flight.

    driver: plan -> missing shards -> actors -> receipts -> publish        actor: label_shard -> commit_shard

Ray Core actors rather than Ray Data: a shard is retried whole and committed by whoever made it, so nothing but a small
receipt travels back, and delivery is as exact as the commit protocol. This is the only module that imports ray.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

# Local Ray: loopback only (without this GCS, raylet and metrics listen on all interfaces, unauthenticated), and no
# usage reports. A cluster's own settings win.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray warns about a coming change of this default, which these actors do not depend on.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
import torch
from ray.exceptions import RayActorError, RayError, RayTaskError

from softlabel_schemas.command_line import progress
from softlabel_schemas.commit import commit_shard
from softlabel_schemas.errors import InputError, IntegrityError
from softlabel_schemas.manifest import Manifest
from softlabel_schemas.plan import ShardRange
from teacher_service.job import PreparedJob, check_skipped, load_job_corpus, missing_shards, publish_job
from teacher_service.pipeline import label_shard
from teacher_service.teacher import load_teacher

# One being labelled, one waiting, so that an actor never idles between shards.
_SHARDS_PER_ACTOR = 2
_MAX_ATTEMPTS = 3
_POLL_SECONDS = 1.0
# Receipts are a few bytes; Ray's default would take a third of the machine's memory.
_OBJECT_STORE_BYTES = 100 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """All that an actor sends back."""

    shard_index: int
    num_frames: int
    num_skipped: int


class LabellingActor:
    """Holds the ensemble and the corpus manifest; makes and commits shards."""

    def __init__(self, job: PreparedJob) -> None:
        self._job = job
        self._seconds_done = 0.0

    def load(self) -> None:
        """Apart from ``__init__``, so that a bad bundle arrives as its own error and not as a dead actor."""
        config, job = self._job.config, self._job
        torch.set_num_threads(config.resources.cpus_per_actor)
        device = "cuda" if config.resources.gpus_per_actor > 0 else "cpu"
        self._teachers = [
            load_teacher(teacher, weight=member.weight, device=device, precision=config.resources.precision)
            for teacher, member in zip(config.teachers, job.document.spec.teachers, strict=True)
        ]
        self._corpus = load_job_corpus(config)
        if self._corpus.digest != job.document.spec.corpus_digest:
            raise InputError(f"{config.corpus.manifest} changed while the job was starting")

    def label(self, shard_range: ShardRange) -> Receipt:
        """Label, store and commit one shard."""

        def on_seconds(seconds: float) -> None:
            self._seconds_done += seconds

        job = self._job
        shard = label_shard(
            self._corpus, shard_range, self._teachers, job.document.spec, job.document.storage, on_seconds=on_seconds
        )
        record = commit_shard(job.store(), job.document, shard_range, shard.utterances, shard.skipped)
        return Receipt(
            shard_index=shard_range.index,
            num_frames=record.shard.num_frames,
            num_skipped=len(record.shard.skipped),
        )

    def seconds_done(self) -> float:
        """Speech labelled so far; answered by a thread of its own while a shard is made."""
        return self._seconds_done


def run_job(job: PreparedJob, *, address: str | None = None) -> tuple[Manifest, int]:
    """Make the missing shards and publish; the manifest, and how many shards this run made.

    Args:
        address: of a Ray cluster; None starts Ray on this machine, or joins the cluster that submitted the job.

    Raises:
        InputError: the input or the job is at fault.
        RuntimeError: shards failed three times; names them and the last error. What was committed stays.
    """
    missing = missing_shards(job)
    if missing:
        with _ray(job, address):
            _Driver(job, missing).run()
    return publish_job(job), len(missing)


@contextmanager
def _ray(job: PreparedJob, address: str | None) -> Iterator[None]:
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    local: dict[str, Any] = {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
    on_terminate = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **(local if address == "local" else {}))
    except ConnectionError as error:
        raise InputError(f"no Ray cluster answers at {address}: {error}") from None
    if on_terminate is not None and threading.current_thread() is threading.main_thread():
        # Ray has put its own handler in place of the command's: one that aborts.
        signal.signal(signal.SIGTERM, on_terminate)
    try:
        resources, asked = ray.cluster_resources(), job.config.resources
        for name, each in (("CPU", float(asked.cpus_per_actor)), ("GPU", asked.gpus_per_actor)):
            if address == "local" and each * asked.num_actors > resources.get(name, 0):
                raise InputError(
                    f"resources: {asked.num_actors} actors with {each:g} {name} each need {each * asked.num_actors:g}, "
                    f"this machine has {resources.get(name, 0):g}"
                )
        yield
    finally:
        ray.shutdown()


class _Driver:
    """Keeps the actors busy; replaces one that dies; gives up on a shard after three attempts."""

    def __init__(self, job: PreparedJob, missing: list[ShardRange]) -> None:
        self._job, self._missing = job, missing
        self._waiting = deque(missing)
        self._attempts: dict[int, int] = {}
        self._failed: dict[int, str] = {}
        self._in_flight: dict[Any, tuple[Any, ShardRange]] = {}
        self._num_skipped = 0
        self._seconds_committed = 0.0
        resources = job.config.resources
        self._actor_class = ray.remote(
            num_cpus=resources.cpus_per_actor,
            num_gpus=resources.gpus_per_actor,
            concurrency_groups={"progress": 1},
        )(LabellingActor)
        self._actors: list[Any] = []

    def run(self) -> None:
        num_actors = min(self._job.config.resources.num_actors, len(self._missing))
        self._actors = [self._start_actor() for _ in range(num_actors)]
        seconds = self._job.seconds_of_shard
        total, before = sum(seconds), sum(seconds) - sum(seconds[shard.index] for shard in self._missing)
        with progress("label", total, "s of speech") as advance:
            advance(before, self._note())
            while self._waiting or self._in_flight:
                self._hand_out()
                ready, _ = ray.wait(list(self._in_flight), timeout=_POLL_SECONDS)
                for reference in ready:
                    self._collect(reference)
                advance(min(total, before + max(self._seconds_committed, self._seconds_labelled())), self._note())
        if self._failed:
            listed = "\n".join(f"  shard {index}: {reason}" for index, reason in sorted(self._failed.items()))
            raise RuntimeError(
                f"{len(self._failed)} shards failed {_MAX_ATTEMPTS} times, the others are done:\n{listed}"
            )

    def _start_actor(self) -> Any:
        actor = self._actor_class.remote(self._job)
        try:
            self._get(actor.load.remote())
        except RayActorError as error:
            raise RuntimeError(f"a labelling actor died while it loaded the teachers: {error}") from error
        return actor

    def _hand_out(self) -> None:
        for actor in self._actors:
            busy = sum(owner is actor for owner, _ in self._in_flight.values())
            while self._waiting and busy < _SHARDS_PER_ACTOR:
                shard_range = self._waiting.popleft()
                self._in_flight[actor.label.remote(shard_range)] = (actor, shard_range)
                busy += 1

    def _collect(self, reference: Any) -> None:
        actor, shard_range = self._in_flight.pop(reference)
        try:
            receipt: Receipt = self._get(reference)
        except RayError as error:
            # Not the task's own exception: the actor died, or Ray ended it (out of memory, a lost node).
            self._replace(actor)
            self._retry(shard_range, f"the actor died: {error}")
        except (OSError, RuntimeError) as error:
            self._retry(shard_range, f"{type(error).__name__}: {error}")
        else:
            self._num_skipped += receipt.num_skipped
            check_skipped(self._job, self._num_skipped)
            self._seconds_committed += self._job.seconds_of_shard[shard_range.index]

    def _replace(self, dead: Any) -> None:
        if dead in self._actors:
            self._actors[self._actors.index(dead)] = self._start_actor()

    def _retry(self, shard_range: ShardRange, reason: str) -> None:
        attempts = self._attempts[shard_range.index] = self._attempts.get(shard_range.index, 0) + 1
        if attempts < _MAX_ATTEMPTS:
            self._waiting.append(shard_range)
        else:
            self._failed[shard_range.index] = reason

    def _get(self, reference: Any) -> Any:
        """The result, or the actor's own exception instead of Ray's wrapping with a remote traceback."""
        try:
            return ray.get(reference)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, InputError | IntegrityError | OSError):
                raise cause from None
            raise RuntimeError(f"{type(cause).__name__}: {cause}") from error

    def _seconds_labelled(self) -> float:
        """Speech labelled by the living actors; one that has just died is left out, its shard's reference tells."""
        answers = [actor.seconds_done.options(concurrency_group="progress").remote() for actor in self._actors]
        ready, _ = ray.wait(answers, num_returns=len(answers), timeout=_POLL_SECONDS)
        total = 0.0
        for answer in ready:
            try:
                total += ray.get(answer)
            except RayActorError:
                continue
        return total

    def _note(self) -> str:
        done = len(self._missing) - len(self._waiting) - len(self._in_flight) - len(self._failed)
        before = len(self._job.plan) - len(self._missing)
        return f"{before + done}/{len(self._job.plan)} shards" + (
            f", {len(self._failed)} failed" if self._failed else ""
        )
