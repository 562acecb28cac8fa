"""The driver's own work over the number of actors: its real loop on a simulated Ray, whose actors label in simulated time.

What Ray adds to each call is not in it; ``tests.benchmarks.workers`` runs real actors.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from softlabel_schemas.plan import ShardRange
from teacher_service import ray_job
from teacher_service.config import load_job
from teacher_service.job import PreparedJob, prepare
from teacher_service.labelling_actor import Beat, Receipt
from teacher_service.shard_queue import ShardQueue
from tests.benchmarks.curves import Curve
from tests.benchmarks.figures import Figure
from tests.benchmarks.scale_records import write_records

# 40 hours of speech at a thousand times real time.
_LABEL_SECONDS = 144.0
_SHARDS_PER_ACTOR = 3


@dataclass(slots=True, eq=False)
class _Reference:
    at: float
    value: Any


class _Actor:
    def __init__(self, ray: _SimulatedRay) -> None:
        self._ray, self._busy_until = ray, 0.0

    def __getattr__(self, name: str) -> Any:
        return _Method(self, name)

    def call(self, name: str) -> _Reference:
        now = self._ray.now
        if name != "label":
            return _Reference(now, Beat(seconds_done=0.0, idle_seconds=0.0))
        seconds = float(self._ray.rng.uniform(0.8, 1.2)) * _LABEL_SECONDS
        self._busy_until = max(self._busy_until, now) + seconds
        return _Reference(self._busy_until, Receipt(num_frames=1, num_skipped=0))


class _Method:
    def __init__(self, actor: _Actor, name: str) -> None:
        self._actor, self._name = actor, name

    def options(self, **_: Any) -> _Method:
        return self

    def remote(self, *_: Any) -> _Reference:
        return self._actor.call(self._name)


class _ActorClass:
    def __init__(self, ray: _SimulatedRay) -> None:
        self._ray = ray

    def remote(self, _job: Any) -> _Actor:
        return _Actor(self._ray)


class _SimulatedRay:
    """What the driver uses of ray and of time. A wait lasts until something is ready or its limit."""

    def __init__(self) -> None:
        self.now, self.rng = 0.0, np.random.default_rng(0)

    def remote(self, *_: Any, **__: Any) -> Any:
        return lambda _actor_class: _ActorClass(self)

    def put(self, value: Any) -> Any:
        return value

    def wait(self, references: Sequence[_Reference], num_returns: int = 1, timeout: float = 0.0) -> Any:
        soonest = min(reference.at for reference in references)
        self.now = max(self.now, min(soonest, self.now + timeout))
        return [reference for reference in references if reference.at <= self.now], []

    def get(self, reference: _Reference, timeout: float) -> Any:
        return reference.value

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def figures(folder: Path, workers: Sequence[int]) -> list[Figure]:
    """CPU seconds of the driver in each second of the run: 1 is a driver that cannot do more."""
    job_path = write_records(folder, str(folder / "labels"), 1, "parquet")
    job = prepare(load_job(job_path))
    shares = [_share(job, num_actors) for num_actors in workers]
    curve = Curve(name="driver's CPU", size_name="workers", unit="of a core", sizes=workers, values=shares)
    note = f"simulated: real driver, Ray and {_LABEL_SECONDS:g} s of labelling a shard simulated"
    return [
        Figure(
            name=f"driver's CPU, {workers[-1]:,} workers",
            unit="cores",
            value=shares[-1],
            target="<= 0.5",
            met=shares[-1] <= 0.5,
            note=f"{note}; without what Ray takes for each call",
        ),
        # Every event has the driver look at every worker.
        curve.figure(note, max_exponent=2.0),
    ]


def _share(job: PreparedJob, num_actors: int) -> float:
    ray, num_shards = _SimulatedRay(), num_actors * _SHARDS_PER_ACTOR
    plan = [ShardRange(index=index, first_row=index, num_rows=1) for index in range(num_shards)]
    resources = job.config.resources.model_copy(update={"num_actors": num_actors})
    config = job.config.model_copy(update={"resources": resources})
    simulated = replace(job, config=config, plan=plan, seconds_of_shard=[1.0] * num_shards)
    with mock.patch.object(ray_job, "ray", ray), mock.patch.object(ray_job, "time", ray):
        driver = ray_job._Driver(simulated, plan)
        # The queue's pauses, of which there are none, are by the clock that it was made with.
        driver._queue = ShardQueue(plan, num_actors=num_actors, clock=ray.monotonic)
        started = time.process_time()
        driver.run()
        taken = time.process_time() - started
    assert driver._queue.num_done == num_shards
    return taken / ray.now
