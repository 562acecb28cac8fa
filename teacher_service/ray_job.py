"""Run a job on Ray: actors that each hold the ensemble, a bounded number of shards in flight.

    driver: plan -> missing shards -> actors -> receipts -> publish        actor: label_shard -> commit_shard

Ray Core actors rather than Ray Data: a shard is retried whole and committed by whoever made it, so nothing but a small
receipt travels back, and delivery is as exact as the commit protocol.

Nothing is waited for without a limit. What is noticed, and when:

=====================================  ==============================================================================
an actor's process or its node died    by Ray: at once for a process, within about half a minute for a node
an actor is frozen                     it has not answered a beat for two minutes
a shard makes no progress              no batch and no stored shard for ``errors.stall_minutes`` (15 by default)
a GPU fails                            by the first shard that its actor then fails
a machine fails all that it is given   by the third shard in a row that an actor fails
an upload is stuck                     after 30 s and 1 s per MiB, and tried again for two minutes (``object_store``)
teachers do not load                   half an hour
no node has room for any actor         ``errors.room_minutes`` (30 by default)
no Ray cluster answers                 ten seconds; one that accepts and then says nothing, two minutes
=====================================  ==============================================================================

The actor is then ended and replaced, and its shard made again, on another machine where there is one; the log names the
machine and the reason. Only this module, ``metrics`` and ``submit`` import ray.
"""

from __future__ import annotations

import math
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from softlabel_schemas import ray_start

# Before Ray: it sets what Ray reads when it is imported.
# isort: split
import ray
from ray.exceptions import RayError, RayTaskError

from softlabel_schemas.command_line import progress
from softlabel_schemas.commit import Published
from softlabel_schemas.errors import InputError, IntegrityError
from softlabel_schemas.plan import ShardRange
from teacher_service.job import PreparedJob, check_skipped, missing_shards, num_skipped, publish_job
from teacher_service.labelling_actor import LabellingActor
from teacher_service.metrics import RunMetrics
from teacher_service.run_record import RunRecord, save_run
from teacher_service.shard_queue import GaveUpError, ShardQueue

# One being labelled, one being committed or waiting, so that an actor never idles between shards.
_SHARDS_PER_ACTOR = 2
_POLL_SECONDS = 1.0
_FROZEN_SECONDS = 120.0
# Of all actors together: a thousand are asked every ten seconds each, up to a hundred in every round.
_BEATS_PER_SECOND = 100
_LOAD_SECONDS = 1800.0
# Of an actor, in a row; then another process, or another node, may do better.
_MAX_FAILED_SHARDS = 3
# Lines of the log about what fails on one machine for one kind of reason; characters of a reason.
_NUM_TOLD, _TOLD_CHARACTERS = 3, 400
# Rounds in a row in which actors failed to start, and none is at work. While others may still load, so many failures for each
# actor too: a node that cannot load fails several times before the first of the others has.
_MAX_FAILED_STARTS = 4


def run_job(job: PreparedJob, *, address: str | None = None) -> tuple[Published, int]:
    """Make the missing shards and publish; what was published, and how many shards this run made.

    Args:
        address: of a Ray cluster; None starts Ray on this machine, or joins the cluster that submitted the job.

    Raises:
        InputError: the input or the job is at fault.
        GaveUpError: shards could not be made; names them and the last error. What was committed stays.
    """
    missing = missing_shards(job)
    if missing:
        skipped_before = num_skipped(job, missing)
        with _ray(job, address):
            driver = _Driver(job, missing, num_skipped=skipped_before)
            try:
                driver.run()
            except RayError as error:
                raise GaveUpError(f"Ray failed under the job: {error}") from error
            finally:
                _save_record(job, driver.record())
    return publish_job(job), len(missing)


def _save_record(job: PreparedJob, record: RunRecord) -> None:
    try:
        save_run(job.store(), record)
    except (OSError, ValueError) as error:
        # Whatever has ended the run is what the user must hear of.
        print(f"warning: what the run took could not be recorded: {error}", file=sys.stderr)


@contextmanager
def _ray(job: PreparedJob, address: str | None) -> Iterator[None]:
    with ray_start.joining(address) as options:
        ray.init(**options)
    try:
        resources, asked = ray.cluster_resources(), job.config.resources
        for name, each in (("CPU", float(asked.cpus_per_actor)), ("GPU", asked.gpus_per_actor)):
            if options["address"] == ray_start.LOCAL and each * asked.num_actors > resources.get(name, 0):
                raise InputError(
                    f"resources: {asked.num_actors} actors with {each:g} {name} each need {each * asked.num_actors:g}, "
                    f"this machine has {resources.get(name, 0):g}"
                )
        yield
    finally:
        ray.shutdown()


@dataclass(slots=True, kw_only=True, eq=False)
class _Worker:
    """One actor as the driver sees it: waiting for room, loading, or at work.

    Attributes:
        starting: reference of the call that it is in before work; None at work.
        since: when that call was made.
        shards: those handed to it, in order, by reference; the first is in work, the second once that
            one is labelled and being committed.
        held_since: when it had room.
        machine: that it has room on.
        failures: shards that it, and those that it replaces, failed or lost since one of them made a shard.
        rests_until: when it may be given a shard again.
        beat: reference of the beat asked for at ``asked``; None where none is outstanding.
        seconds_done: of speech that it has labelled, as its last beat says; ``seconds_committed``: of what it has committed.
    """

    actor: Any
    starting: Any
    since: float
    has_room: bool = False
    held_since: float = 0.0
    machine: str = ""
    failures: int = 0
    rests_until: float = 0.0
    shards: dict[Any, ShardRange] = field(default_factory=dict)
    beat: Any = None
    asked: float = 0.0
    seconds_done: float = 0.0
    seconds_committed: float = 0.0

    @property
    def seconds_in_work(self) -> float:
        """Labelled and not committed; a shard may be committed before a beat tells of its last batches."""
        return max(0.0, self.seconds_done - self.seconds_committed)


def _described(error: Exception) -> str:
    """With its type; those of actors that are RuntimeErrors here name their own."""
    return str(error) if isinstance(error, RuntimeError) else f"{type(error).__name__}: {error}"


class _Driver:
    """Keeps the actors busy; replaces one that dies or is stuck."""

    def __init__(self, job: PreparedJob, missing: list[ShardRange], *, num_skipped: int = 0) -> None:
        self._job, self._num_missing = job, len(missing)
        self._num_actors = min(job.config.resources.num_actors, len(missing))
        self._queue = ShardQueue(missing, num_actors=self._num_actors)
        self._metrics = RunMetrics(job.document.spec.fingerprint())
        # Of the whole dataset, as ``max_skipped_fraction`` is.
        self._num_skipped = num_skipped
        # In a row; and the rounds of ``_wait`` that they were in: several actors of one lost node fail in one.
        self._failed_starts = self._failed_rounds = 0
        self._round_failed = False
        # Machines on which teachers did not load, the last time; and how many of them are new since some did.
        self._cannot_load = set[str]()
        self._num_cannot_load = 0
        self._last_room = time.monotonic()
        self._began, self._first_room = datetime.now(UTC), math.inf
        # Of actors that were replaced.
        self._actor_seconds = 0.0
        self._seconds_committed = 0.0
        self._seconds_before = sum(job.seconds_of_shard) - sum(job.seconds_of_shard[shard.index] for shard in missing)
        resources = job.config.resources
        self._actor_class = ray.remote(
            num_cpus=resources.cpus_per_actor,
            num_gpus=resources.gpus_per_actor,
            concurrency_groups={"beats": 1, "shards": _SHARDS_PER_ACTOR},
        )(LabellingActor)
        # An actor needs no plan: of 25,000 shards it makes a few.
        self._job_of_actors = ray.put(replace(job, plan=[], seconds_of_shard=[]))
        self._workers: list[_Worker] = []
        # By event, machine and kind of reason.
        self._num_told = Counter[tuple[str, str, str]]()
        # When to start another actor for one that failed to start, or was lost; with its failures.
        self._restarts: list[tuple[float, int]] = []

    def run(self) -> None:
        self._workers = [self._start_worker() for _ in range(self._num_actors)]
        total = sum(self._job.seconds_of_shard)
        with progress("label", total, "s of speech") as advance:
            advance(self._seconds_before, self._note())
            while self._queue.num_waiting or any(worker.shards for worker in self._workers):
                self._hand_out()
                self._wait()
                # What a lost worker had in work is gone, what it had committed stays.
                labelled = self._seconds_committed + sum(worker.seconds_in_work for worker in self._workers)
                advance(min(total, self._seconds_before + labelled), self._note())
                self._metrics.update(self._num_shards_by_state(), self._queue.num_retries)
        self._queue.check()

    def record(self) -> RunRecord:
        """Of the run until now."""
        return RunRecord(
            fingerprint=self._job.document.spec.fingerprint(),
            started=self._began.isoformat(timespec="seconds"),
            wall_seconds=max(0.0, time.monotonic() - self._first_room),
            actor_seconds=self._actor_seconds + sum(map(self._held_seconds, self._workers)),
            num_shards=self._queue.num_done,
            num_retries=self._queue.num_retries,
        )

    def _held_seconds(self, worker: _Worker) -> float:
        return time.monotonic() - worker.held_since if worker.has_room else 0.0

    def _start_worker(self, failures: int = 0) -> _Worker:
        actor = self._actor_class.remote(self._job_of_actors)
        return _Worker(actor=actor, starting=actor.start.remote(), since=time.monotonic(), failures=failures)

    def _hand_out(self) -> None:
        """One for each first. Near the end no actor gets a second one: it would wait while another actor idles."""
        now = time.monotonic()
        self._queue.machines = {
            worker.machine
            for worker in self._workers
            if worker.starting is None or (worker.has_room and worker.machine not in self._cannot_load)
        }
        for depth in range(_SHARDS_PER_ACTOR):
            for worker in self._workers:
                if depth and self._queue.num_waiting < len(self._workers):
                    return
                if worker.starting is None and len(worker.shards) == depth and worker.rests_until <= now:
                    shard_range = self._queue.next(worker.machine)
                    if shard_range is None:
                        continue
                    label = worker.actor.label.options(concurrency_group="shards")
                    worker.shards[label.remote(shard_range)] = shard_range

    def _wait(self) -> None:
        """Until something has happened, at most a poll's length; then attend to every worker that it happened to."""
        now = time.monotonic()
        self._workers += [self._start_worker(failures) for due, failures in self._restarts if due <= now]
        self._restarts = [(due, failures) for due, failures in self._restarts if due > now]
        pending = [worker.starting for worker in self._workers if worker.starting is not None]
        pending += [reference for worker in self._workers for reference in worker.shards]
        if pending:
            ready = set(ray.wait(pending, num_returns=len(pending), timeout=0)[0])
            ready = ready or set(ray.wait(pending, timeout=_POLL_SECONDS)[0])
        else:
            # All that is left pauses.
            time.sleep(_POLL_SECONDS)
            ready = set()
        beats = [worker.beat for worker in self._workers if worker.beat is not None]
        if beats:
            ready |= set(ray.wait(beats, num_returns=len(beats), timeout=0)[0])
        self._round_failed = False
        for worker in list(self._workers):
            if worker.starting in ready:
                self._started(worker)
            for reference in [reference for reference in worker.shards if reference in ready]:
                if worker in self._workers:
                    self._collect(worker, reference)
            if worker in self._workers:
                self._check_alive(worker, ready)
        self._check_room()

    def _started(self, worker: _Worker) -> None:
        try:
            answer = self._get(worker.starting)
        except RayError as error:
            self._start_failed(worker, f"the actor died: {error}")
            return
        except (IntegrityError, OSError, RuntimeError) as error:
            self._start_failed(worker, _described(error))
            return
        if worker.has_room:
            worker.starting = None
            self._failed_starts = self._failed_rounds = 0
            self._cannot_load.discard(worker.machine)
            self._num_cannot_load = 0
        else:
            now = time.monotonic()
            self._first_room = min(self._first_room, now)
            worker.has_room, worker.held_since, worker.machine = True, now, answer
            worker.since, worker.starting = now, worker.actor.load.remote()

    def _start_failed(self, worker: _Worker, reason: str) -> None:
        """Raises GaveUpError where that went on for some rounds, no actor is at work, and none loads on a machine on which that
        has not failed."""
        self._failed_starts += 1
        self._failed_rounds += not self._round_failed
        self._round_failed = True
        if worker.machine and worker.machine not in self._cannot_load:
            self._cannot_load.add(worker.machine)
            self._num_cannot_load += 1
        others, now = [other for other in self._workers if other is not worker], time.monotonic()
        at_work = any(other.starting is None for other in others)
        if at_work:
            # Only those after count, should it be lost.
            self._failed_starts = 0
        recent = [other for other in others if now - other.since < _LOAD_SECONDS]
        loads = any(other.has_room and other.machine not in self._cannot_load for other in recent)
        # Of new names there may be no end, where machines come and go.
        loads &= self._num_cannot_load < _MAX_FAILED_STARTS * self._num_actors
        enough = self._failed_starts >= (_MAX_FAILED_STARTS * self._num_actors if recent or self._restarts else 1)
        if self._failed_rounds >= _MAX_FAILED_STARTS and enough and not at_work and not loads:
            raise GaveUpError(f"teachers could not be loaded in {self._failed_starts} attempts, the last: {reason}")
        self._replace(worker, reason, after=self._queue.pause(self._failed_rounds))

    def _collect(self, worker: _Worker, reference: Any) -> None:
        shard_range = worker.shards[reference]
        try:
            receipt = self._get(reference)
        except RayError as error:
            # Not the task's own exception: the actor died, or Ray ended it (out of memory, a lost node).
            self._lose(worker, f"the actor died: {error}")
            return
        except (IntegrityError, OSError, RuntimeError) as error:
            reason = _described(error)
            if isinstance(error, RuntimeError) and self._job.config.resources.gpus_per_actor > 0:
                # After a fault of its GPU a process answers beats, and fails every shard that it is given within seconds: the
                # whole job's, one after the other.
                self._lose(worker, reason, blamed=reference)
                return
            self._tell("a shard failed", worker, reason)
            self._queue.failed(worker.shards.pop(reference), reason, worker.machine)
            worker.failures += 1
            if worker.failures % _MAX_FAILED_SHARDS == 0:
                self._end(worker, reason)
            else:
                worker.rests_until = time.monotonic() + self._queue.pause(worker.failures)
            return
        del worker.shards[reference]
        worker.failures = 0
        self._queue.done(worker.machine)
        self._num_skipped += receipt.num_skipped
        seconds = self._job.seconds_of_shard[shard_range.index]
        self._seconds_committed += seconds
        worker.seconds_committed += seconds
        check_skipped(self._job, self._num_skipped)

    def _check_alive(self, worker: _Worker, ready: set[Any]) -> None:
        now = time.monotonic()
        if worker.starting is not None:
            self._check_starting(worker, now - worker.since)
            return
        if worker.beat is None:
            if now - worker.asked < self._num_actors / _BEATS_PER_SECOND:
                return
            worker.beat, worker.asked = worker.actor.beat.options(concurrency_group="beats").remote(), now
            return
        if worker.beat not in ready:
            if now - worker.asked > _FROZEN_SECONDS:
                self._lose(worker, f"the actor did not answer for {_FROZEN_SECONDS:g} s")
            return
        try:
            beat = self._get(worker.beat)
        except (RayError, RuntimeError) as error:
            self._lose(worker, f"the actor died: {error}")
            return
        worker.beat, worker.seconds_done = None, beat.seconds_done
        stalled = 60 * self._job.config.errors.stall_minutes
        if beat.idle_seconds > stalled:
            self._lose(worker, f"no progress: nothing for {beat.idle_seconds:.0f} s (errors.stall_minutes)")

    def _check_starting(self, worker: _Worker, seconds: float) -> None:
        if worker.has_room and seconds > _LOAD_SECONDS:
            self._start_failed(worker, f"not done after {seconds:.0f} s")

    def _check_room(self) -> None:
        """Raises GaveUpError where no actor has had room for too long."""
        now, minutes = time.monotonic(), self._job.config.errors.room_minutes
        if self._restarts or any(worker.has_room for worker in self._workers):
            self._last_room = now
        elif now - self._last_room > 60 * minutes:
            resources = self._job.config.resources
            raise GaveUpError(
                f"no node of the Ray cluster had {resources.cpus_per_actor} CPU and {resources.gpus_per_actor:g} GPU free "
                f"for a labelling actor within {minutes:g} min (errors.room_minutes); run again when there is room"
            )

    def _lose(self, worker: _Worker, reason: str, *, blamed: Any = None) -> None:
        """Of its shards only one counts as lost: the first, where none is ``blamed``. The second may have been in work too; if
        it is at fault, it is the first of the next actor's."""
        blamed = next(iter(worker.shards), None) if blamed is None else blamed
        if blamed is not None:
            self._queue.lost(worker.shards.pop(blamed), reason, worker.machine)
        worker.failures += 1
        self._end(worker, reason)

    def _end(self, worker: _Worker, reason: str) -> None:
        """No shard that it still has is to blame."""
        for shard_range in worker.shards.values():
            self._queue.put_back(shard_range)
        worker.shards.clear()
        # The first at once: a process or a node that died says nothing of the next. Then with growing pauses.
        self._replace(worker, reason, after=self._queue.pause(worker.failures) if worker.failures > 1 else 0.0)

    def _replace(self, worker: _Worker, reason: str, *, after: float) -> None:
        self._tell("an actor was ended", worker, reason)
        ray.kill(worker.actor)
        self._actor_seconds += self._held_seconds(worker)
        self._workers.remove(worker)
        self._restarts.append((time.monotonic() + after, worker.failures))

    def _tell(self, event: str, worker: _Worker, reason: str) -> None:
        """A line of the log, for the first few events of a kind on each machine."""
        kind = (event, worker.machine, reason.partition(":")[0])
        self._num_told[kind] += 1
        if self._num_told[kind] > _NUM_TOLD:
            return
        where, why = worker.machine or "a machine without a name yet", textwrap.shorten(reason, _TOLD_CHARACTERS)
        more = "; more like it are not shown" if self._num_told[kind] == _NUM_TOLD else ""
        print(f"warning: {event} on {where}: {why}{more}", file=sys.stderr)

    def _get(self, reference: Any) -> Any:
        """The result, or the actor's own exception instead of Ray's wrapping with a remote traceback."""
        try:
            # It is ready, and small: the limit is for an object whose node is lost at this moment.
            return ray.get(reference, timeout=_FROZEN_SECONDS)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, InputError | IntegrityError | OSError):
                raise cause from None
            raise RuntimeError(f"{type(cause).__name__}: {cause}") from error

    def _num_shards_by_state(self) -> dict[str, int]:
        queue = self._queue
        return {
            "waiting": queue.num_waiting,
            "in_work": sum(len(worker.shards) for worker in self._workers),
            "committed": len(self._job.plan) - self._num_missing + queue.num_done,
            "given_up": len(queue.given_up),
        }

    def _note(self) -> str:
        queue, num_shards = self._queue, len(self._job.plan)
        notes = [f"{num_shards - self._num_missing + queue.num_done}/{num_shards} shards"]
        if not any(worker.has_room for worker in self._workers):
            notes.append("waiting for room on the cluster")
        if queue.num_retries:
            notes.append(f"{queue.num_retries} retries")
        if queue.given_up:
            notes.append(f"{len(queue.given_up)} failed")
        return ", ".join(notes)
