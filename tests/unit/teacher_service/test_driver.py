"""The driver's decisions over hours of simulated time: actors that die, have no room, or never answer.

Only Ray and the clock are simulated; what a real cluster does within minutes is in ``tests/e2e/test_cluster.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from softlabel_schemas.errors import IntegrityError
from softlabel_schemas.plan import ShardRange
from teacher_service import ray_job
from teacher_service.job import PreparedJob, prepare
from teacher_service.labelling_actor import Beat, Receipt
from teacher_service.ray_job import _Driver
from teacher_service.shard_queue import GaveUpError, ShardQueue
from tests.support.teachers import make_job, write_linear_teacher, write_sounds

NEVER = math.inf
SHARD_SECONDS = 7200.0
LOAD_SECONDS = 60.0


@dataclass(eq=False)
class Reference:
    actor: Actor
    at: float
    value: Any

    @property
    def when(self) -> float:
        return min(self.at, self.actor.dies_at)


@dataclass(eq=False)
class Actor:
    """The ``number``-th that was started; the test sets the times of what goes wrong."""

    cluster: SimulatedRay
    number: int
    room_at: float
    dies_at: float = NEVER
    label_seconds: float = SHARD_SECONDS
    load_seconds: float = LOAD_SECONDS
    load_error: Exception | None = None
    machine: str = ""
    busy_until: float = 0.0
    begun: list[float] = field(default_factory=list)
    on_label: Callable[[Actor], None] = field(default=lambda _actor: None)
    # From then on every shard fails soon.
    fails_at: float = NEVER
    fail_seconds: float = 5.0
    error: Exception = field(
        default_factory=lambda: RuntimeError("AcceleratorError: CUDA error: unspecified launch failure")
    )

    def __post_init__(self) -> None:
        self.machine = self.machine or f"node-{self.number}"

    def __getattr__(self, name: str) -> Any:
        if name not in ("start", "load", "label", "beat"):
            raise AttributeError(name)
        return _Method(self, name)

    def shares_labelled(self) -> list[float]:
        """Of each shard that it began."""
        now = min(self.cluster.now, self.dies_at)
        return [min(max(now - begun, 0.0) / self.label_seconds, 1.0) for begun in self.begun]

    def call(self, name: str) -> Reference:
        now = self.cluster.now
        if name == "start":
            return Reference(self, self.room_at, self.machine)
        if name == "load":
            return Reference(self, now + self.load_seconds, self.load_error)
        if name == "beat":
            return Reference(self, now, Beat(seconds_done=sum(self.shares_labelled()), idle_seconds=0.0))
        self.on_label(self)
        if now >= self.fails_at:
            return Reference(self, now + self.fail_seconds, self.error)
        self.begun.append(max(self.busy_until, now))
        self.busy_until = self.begun[-1] + self.label_seconds
        return Reference(self, self.busy_until, Receipt(num_frames=1, num_skipped=0))


class _Method:
    def __init__(self, actor: Actor, name: str) -> None:
        self._actor, self._name = actor, name

    def options(self, **_: Any) -> _Method:
        return self

    def remote(self, *_: Any) -> Reference:
        return self._actor.call(self._name)


class SimulatedRay:
    """What the driver uses of ray and of time."""

    def __init__(self, on_start: Callable[[Actor], None]) -> None:
        self.now = 1000.0
        self.started: list[Actor] = []
        self._on_start = on_start

    def remote(self, **_: Any) -> Callable[[type], SimulatedRay]:
        return lambda _actor_class: _ActorClass(self)  # type: ignore[return-value]

    def start(self) -> Actor:
        actor = Actor(cluster=self, number=len(self.started), room_at=self.now + 1)
        self.started.append(actor)
        self._on_start(actor)
        return actor

    def put(self, value: Any) -> Any:
        return value

    def wait(self, references: Sequence[Reference], num_returns: int = 1, timeout: float = 0.0) -> Any:
        for seconds in (0.0, timeout):
            self.now += seconds
            ready = [reference for reference in references if reference.when <= self.now]
            if ready:
                break
        return ready, [reference for reference in references if reference not in ready]

    def get(self, reference: Reference, timeout: float) -> Any:
        if reference.actor.dies_at < reference.at:
            raise ActorDiedError
        if isinstance(reference.value, Exception):
            raise reference.value
        return reference.value

    def kill(self, actor: Actor) -> None:
        actor.dies_at = min(actor.dies_at, self.now)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class _ActorClass:
    def __init__(self, cluster: SimulatedRay) -> None:
        self._cluster = cluster

    def remote(self, *_: Any) -> Actor:
        return self._cluster.start()


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> PreparedJob:
    folder = tmp_path_factory.mktemp("job")
    return prepare(make_job(_manifest(folder), [write_linear_teacher(folder / "teacher")], folder / "labels"))


def _manifest(folder: Path) -> str:
    return write_sounds(folder / "sounds", [0.3]).manifest


@pytest.fixture
def simulate(job: PreparedJob, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[SimulatedRay, float]]:
    """A function: run so many shards on so many actors, and return Ray and the hours it took."""

    def run(
        on_start: Callable[[Actor], None],
        num_shards: int,
        num_actors: int,
        num_gpus: float = 0.0,
        room_minutes: float = 30.0,
    ) -> tuple[SimulatedRay, float]:
        ray = SimulatedRay(on_start)
        monkeypatch.setattr(ray_job, "ray", ray)
        monkeypatch.setattr(ray_job, "time", ray)
        update = {"num_actors": num_actors, "gpus_per_actor": num_gpus}
        resources = job.config.resources.model_copy(update=update)
        errors = job.config.errors.model_copy(update={"room_minutes": room_minutes})
        plan = [ShardRange(index=index, first_row=index, num_rows=1) for index in range(num_shards)]
        simulated = replace(
            job,
            config=job.config.model_copy(update={"resources": resources, "errors": errors}),
            plan=plan,
            seconds_of_shard=[1.0] * num_shards,
        )
        driver = _Driver(simulated, plan)
        driver._queue = ShardQueue(plan, num_actors=num_actors, seed=1, clock=ray.monotonic)
        began = ray.now
        driver.run()
        return ray, (ray.now - began) / 3600

    return run


def test_a_node_that_is_lost_while_its_actors_load_does_not_end_the_job(simulate: Any) -> None:
    """8 of 64 actors die at once; 56 are well."""

    def on_start(actor: Actor) -> None:
        if actor.number < 8:
            actor.dies_at = actor.cluster.now + 30

    ray, hours = simulate(on_start, 128, 64)
    assert len(ray.started) == 72
    assert hours < 4.2


def test_replacements_that_die_while_they_load_do_not_end_a_job_that_works(simulate: Any) -> None:
    def on_start(actor: Actor) -> None:
        if actor.number in (0, 8, 9, 10, 11, 12):
            actor.dies_at = actor.cluster.now + (100 if actor.number == 0 else 20)

    ray, _ = simulate(on_start, 16, 8)
    assert len(ray.started) == 14


@pytest.mark.parametrize("num_actors", [1, 8, 64])
def test_teachers_that_never_load_end_the_job(simulate: Any, num_actors: int) -> None:
    started: list[Actor] = []

    def on_start(actor: Actor) -> None:
        started.append(actor)
        actor.dies_at = actor.cluster.now + 30

    with pytest.raises(GaveUpError, match=r"teachers could not be loaded in \d+ attempts, the last: the actor died"):
        simulate(on_start, 64, num_actors)
    assert len(started) <= 6 * num_actors
    assert started[0].cluster.now - 1000 < 600


def test_teachers_that_never_load_where_no_other_actor_has_room(simulate: Any) -> None:
    started: list[Actor] = []

    def on_start(actor: Actor) -> None:
        started.append(actor)
        actor.room_at = NEVER if actor.number in range(1, 8) else actor.room_at
        actor.load_error = OSError("not seen from this machine")

    with pytest.raises(GaveUpError, match=r"attempts, the last: OSError: not seen from this machine"):
        simulate(on_start, 64, 8)
    assert started[0].cluster.now - 1000 < 2000


@pytest.mark.parametrize(("load_seconds", "error"), [(60.0, IntegrityError), (1700.0, OSError)])
def test_a_machine_that_cannot_load_does_not_end_the_job_while_the_others_load(
    simulate: Any, load_seconds: float, error: type[Exception]
) -> None:
    def on_start(actor: Actor) -> None:
        actor.load_seconds, actor.label_seconds = load_seconds, 600.0
        if actor.number == 0 or actor.number >= 50:
            actor.load_seconds, actor.load_error = 5.0, error("read on this machine")

    _, hours = simulate(on_start, 98, 50)
    assert hours == pytest.approx((2 * 600 + load_seconds) / 3600, abs=0.05)


@pytest.mark.parametrize(("num_actors", "num_bad"), [(2, 1), (16, 8)])
def test_machines_that_cannot_load_do_not_end_the_job(simulate: Any, num_actors: int, num_bad: int) -> None:
    """Neither while the others load nor while they do so once more, having been lost all at once."""
    num_good = num_actors - num_bad
    again = iter(range(num_good))

    def on_start(actor: Actor) -> None:
        actor.load_seconds, actor.label_seconds = 300.0, 600.0
        if num_bad <= actor.number < num_actors:
            actor.dies_at = 8000.0
        elif actor.cluster.now < 8000.0 or next(again, None) is None:
            actor.machine, actor.load_seconds, actor.load_error = "bad", 2.0, OSError("no package")

    _, hours = simulate(on_start, 40 * num_good, num_actors)
    assert hours < 43 * 600 / 3600


def test_the_only_actor_with_room_is_lost_and_a_node_joins_later(simulate: Any) -> None:
    """There is room for one of two actors; the one at work dies after forty minutes, and room comes ten minutes later."""

    def on_start(actor: Actor) -> None:
        actor.label_seconds = 600.0
        if actor.number == 0:
            actor.dies_at = actor.cluster.now + 2400
        elif actor.number == 1:
            actor.room_at = NEVER
        else:
            actor.room_at = actor.cluster.now + 600

    _, hours = simulate(on_start, 12, 2)
    assert hours < 3


@pytest.mark.parametrize("minutes", [30, 60])
def test_no_room_for_any_actor_ends_the_job_in_time(simulate: Any, minutes: float) -> None:
    actors: list[Actor] = []

    def on_start(actor: Actor) -> None:
        actors.append(actor)
        actor.room_at = NEVER

    message = rf"no node of the Ray cluster had 1 CPU and 0 GPU free .* within {minutes} min \(errors.room_minutes\)"
    with pytest.raises(GaveUpError, match=message):
        simulate(on_start, 4, 2, room_minutes=minutes)
    assert actors[0].cluster.now - 1000 == pytest.approx(60 * minutes, abs=5)


def test_a_model_that_kills_every_actor_ends_the_job_soon(simulate: Any) -> None:
    def die(actor: Actor) -> None:
        actor.dies_at = min(actor.dies_at, actor.cluster.now + 30)

    cluster: list[SimulatedRay] = []

    def on_start(actor: Actor) -> None:
        cluster[:] = [actor.cluster]
        actor.on_label = die

    with pytest.raises(GaveUpError, match="the last 16 attempts at shards all failed"):
        simulate(on_start, 25_000, 4)
    assert len(cluster[0].started) <= 20
    assert cluster[0].now - 1000 < 3600


@pytest.mark.parametrize("fails_after", [0.0, 1000.0])
def test_an_actor_whose_gpu_fails_is_replaced_before_it_has_failed_the_job(simulate: Any, fails_after: float) -> None:
    def on_start(actor: Actor) -> None:
        actor.label_seconds = 300.0
        if actor.number == 0:
            actor.fails_at = actor.cluster.now + fails_after

    ray, hours = simulate(on_start, 200, 4, 1.0)
    assert len(ray.started) == 5
    assert hours < 4.6


@pytest.mark.parametrize(("num_actors", "num_bad", "fail_seconds"), [(50, 1, 1.0), (8, 1, 30.0), (16, 8, 1.0)])
def test_a_machine_that_fails_all_that_it_is_given_costs_no_shard(
    simulate: Any, capsys: pytest.CaptureFixture[str], num_actors: int, num_bad: int, fail_seconds: float
) -> None:
    """As one without the mount that the audio lies on: at first it is the only one that asks for more, and what is started
    there instead is no better."""

    def on_start(actor: Actor) -> None:
        actor.label_seconds = 180.0
        if actor.number < num_bad or actor.number >= num_actors:
            actor.machine, actor.fails_at, actor.fail_seconds = "bad", actor.cluster.now, fail_seconds
            actor.error = FileNotFoundError("utt-001.wav does not exist")

    ray, hours = simulate(on_start, 400, num_actors)
    assert hours < 1.1 * (400 / (num_actors - num_bad) + 1) * 180 / 3600
    # Its pauses grow.
    assert len(ray.started) < num_actors + num_bad * (2 + hours * 60)
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if "on bad" in line] == [
        f"warning: {event} on bad: FileNotFoundError: utt-001.wav does not exist{more}"
        for event in ("a shard failed", "an actor was ended")
        for more in ("", "", "; more like it are not shown")
    ]


@pytest.mark.parametrize(("num_actors", "num_bad"), [(8, 3), (16, 8)])
def test_several_such_machines_cost_no_shard_either(simulate: Any, num_actors: int, num_bad: int) -> None:
    def on_start(actor: Actor) -> None:
        actor.label_seconds = 180.0
        if actor.number < num_bad or actor.number >= num_actors:
            actor.machine = f"bad-{actor.number % num_bad}"
            actor.fails_at, actor.fail_seconds = actor.cluster.now, 1.0
            actor.error = FileNotFoundError("utt-001.wav does not exist")

    _, hours = simulate(on_start, 400, num_actors)
    assert hours < 1.1 * (400 / (num_actors - num_bad) + 1) * 180 / 3600


@pytest.mark.parametrize("num_actors", [1, 4, 50])
def test_what_fails_on_every_machine_ends_the_job_soon(simulate: Any, num_actors: int) -> None:
    cluster: list[SimulatedRay] = []

    def on_start(actor: Actor) -> None:
        cluster[:] = [actor.cluster]
        actor.fails_at, actor.fail_seconds = actor.cluster.now, 180.0
        actor.machine, actor.error = f"node-{actor.number % num_actors}", PermissionError("no access to the bucket")

    with pytest.raises(GaveUpError, match=r"attempts at shards all failed, the last one: PermissionError: no access"):
        simulate(on_start, 25_000, num_actors)
    # Each fails three shards; a single one twelve.
    assert cluster[0].now - 1000 < (3600 if num_actors == 1 else 1000)


def test_no_actor_waits_with_a_second_shard_while_another_idles(simulate: Any) -> None:
    _, hours = simulate(lambda _actor: None, 2, 2)
    assert hours == pytest.approx(SHARD_SECONDS / 3600, abs=0.05)


def test_progress_is_what_is_committed_and_what_actors_at_work_have_labelled(
    simulate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of two actors is lost in the middle of its second shard; a shard has a second of speech."""
    actors, errors = list[Actor](), list[float]()

    def on_start(actor: Actor) -> None:
        actors.append(actor)
        if actor.number == 0:
            actor.dies_at = actor.cluster.now + 1.5 * SHARD_SECONDS

    def labelled() -> float:
        shares = [(actor, share) for actor in actors for share in actor.shares_labelled()]
        return sum(share for actor, share in shares if share == 1 or actor.cluster.now < actor.dies_at)

    @contextmanager
    def progress(*_: Any) -> Iterator[Callable[[float, str], None]]:
        yield lambda done, _note: errors.append(abs(done - labelled()))

    monkeypatch.setattr(ray_job, "progress", progress)
    _, hours = simulate(on_start, 16, 2)
    assert len(errors) > hours * 3000
    assert max(errors) < 0.01
