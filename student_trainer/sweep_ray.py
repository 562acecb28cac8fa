"""Runs of a sweep as Ray tasks, one for each arm and seed; the only module of the student side that imports ray.

A task that dies with its process (out of memory, a lost node) is started again by Ray and goes on from the run's
checkpoint; one that raises is not. Ctrl-C reaches each task as a KeyboardInterrupt, at which training writes a checkpoint. On a
cluster the folders of the sweep, the corpus and the labels lie on a disk that the nodes share.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from softlabel_schemas import ray_start

# Before Ray: it sets what Ray reads when it is imported.
# isort: split
import ray
from ray.exceptions import RayError, RayTaskError, TaskCancelledError

from softlabel_schemas.command_line import CheckFailedError
from softlabel_schemas.errors import InputError
from student_trainer.config import TrainConfig
from student_trainer.device import warn_of_slow_precision
from student_trainer.sweep_config import EvaluateConfig
from student_trainer.sweep_status import SweepStatus
from student_trainer.sweep_task import train_and_evaluate

_POLL_SECONDS = 1.0
# For the checkpoints of what is interrupted: a step and a write.
_LEAVING_SECONDS = 60.0
# Until a node joins that has room for a run; those of a cluster that grows come within minutes.
_ROOM_SECONDS = 1800.0

Task = Callable[[TrainConfig, EvaluateConfig, Path | None], None]
# By Ray's names: "CPU", "GPU".
Resources = Mapping[str, float]


def run_on_ray(
    runs: Sequence[TrainConfig],
    evaluate: EvaluateConfig,
    *,
    features: Path | None = None,
    address: str | None = None,
    task: Task = train_and_evaluate,
) -> dict[str, str]:
    """Run all; what failed, as messages by run folder.

    Args:
        features: see ``train_and_evaluate``.
        address: of a Ray cluster; None starts Ray on this machine, or joins the cluster that submitted the job.

    Raises:
        InputError: Ray cannot be joined, or this machine has too few cores for a run.
        CheckFailedError: Ray itself failed.
        KeyboardInterrupt: after the runs in work have written their checkpoints.
    """
    with _ray(address) as is_local:
        if is_local:
            _check_room(runs)
            # Each run says it in its log alone.
            for training in [config.training for config in runs if config.training.precision == "bfloat16"][:1]:
                warn_of_slow_precision(training)
        num_gpus = ray.cluster_resources().get("GPU", 0)
        needs = {config.output: _needs(config, num_gpus) for config in runs}
        # A process for each run, although to start one takes seconds: a worker of Ray that went on with the next had 0.6 GB
        # more with about every second run of one hour of speech.
        remote = ray.remote(max_calls=1)(_interruptible(task))
        pending = {
            remote.options(
                num_cpus=needs[config.output]["CPU"],
                num_gpus=needs[config.output]["GPU"],
                name=config.output.rsplit("/", 1)[-1],
            ).remote(config, evaluate, features): config
            for config in runs
        }
        try:
            return _collect(pending, runs, needs)
        except KeyboardInterrupt:
            _interrupt(list(pending))
            raise
        except RayError as error:
            raise CheckFailedError(f"Ray failed under the sweep: {error}; run again to go on") from error


def _interruptible(task: Task) -> Task:
    """Ray interrupts a task in Python's way, which does nothing in a process that was begun with SIGINT ignored; those that
    ``nohup student-trainer sweep ... &`` begins from a script are."""

    def interruptible(config: TrainConfig, evaluate: EvaluateConfig, features: Path | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        task(config, evaluate, features)

    return interruptible


def _collect(
    pending: dict[Any, TrainConfig], runs: Sequence[TrainConfig], needs: Mapping[str, Resources]
) -> dict[str, str]:
    """What failed, as messages by run folder.

    Args:
        needs: of each run, by its folder.
    """
    failures: dict[str, str] = {}
    last_room = time.monotonic()
    with SweepStatus(runs) as status:
        while pending:
            ready, _ = ray.wait(list(pending), num_returns=len(pending), timeout=_POLL_SECONDS)
            for reference in ready:
                error = _error(reference)
                config = pending.pop(reference)
                if error is not None:
                    failures[config.output] = error
                status.done(config)
            num_slots = _num_slots([needs[config.output] for config in pending.values()], _nodes())
            now = time.monotonic()
            if num_slots:
                last_room = now
            elif now - last_room > _ROOM_SECONDS:
                # What has run is compared all the same.
                for reference, config in pending.items():
                    ray.cancel(reference)
                    failures[config.output] = _no_room(needs[config.output])
                    status.done(config)
                pending.clear()
            status.show(num_slots=num_slots, num_failed=len(failures))
    return failures


def _error(reference: Any) -> str | None:
    try:
        ray.get(reference)
    except RayTaskError as error:
        cause = error.cause
        return str(cause) if isinstance(cause, InputError) else f"{type(cause).__name__}: {cause}"
    except RayError as error:
        return f"{type(error).__name__}: {error}"
    return None


def _interrupt(references: Sequence[Any]) -> None:
    """End tasks and wait until those in work have saved; a second Ctrl-C waits no longer."""
    for reference in references:
        ray.cancel(reference)
    deadline = time.monotonic() + _LEAVING_SECONDS
    for reference in references:
        with contextlib.suppress(RayError, TaskCancelledError):
            ray.get(reference, timeout=max(deadline - time.monotonic(), 0.1))


def _threads(config: TrainConfig) -> int:
    threads = config.training.num_threads
    assert threads is not None  # load_sweep gives every run a number
    return threads


def _processors(config: TrainConfig) -> int:
    """For the processes that make its batches, too."""
    return _threads(config) + (config.training.num_processes or 0)


def _needs(config: TrainConfig, num_gpus: float) -> Resources:
    """Ray shows a run the GPUs that it asked for: each has one for itself, with "auto" too where there are ``num_gpus`` of them
    in the cluster."""
    device = config.training.device
    wants_gpu = device.startswith("cuda") or (device == "auto" and num_gpus > 0)
    return {"CPU": _processors(config), "GPU": int(wants_gpu)}


def _nodes() -> list[Resources]:
    """What each living node has, in use or not."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _num_slots(waiting: Sequence[Resources], nodes: Sequence[Resources]) -> int:
    """How many of these there is room for at a time; 0 where no node has room for any."""
    fitting = [needs for needs in waiting if any(_times(needs, node) for node in nodes)]
    if not fitting:
        return 0
    largest = {name: max(needs[name] for needs in fitting) for name in ("CPU", "GPU")}
    return max(sum(_times(largest, node) for node in nodes), 1)


def _times(needs: Resources, node: Resources) -> int:
    """How often the node has what is needed."""
    return min(int(node.get(name, 0) // number) for name, number in needs.items() if number)


def _no_room(needs: Resources) -> str:
    return (
        f"no node of the Ray cluster had {needs['CPU']:g} CPU and {needs['GPU']:g} GPU for this run within "
        f"{_ROOM_SECONDS / 60:.0f} min; lower training.num_threads or num_processes, or add such a node"
    )


def _check_room(runs: Sequence[TrainConfig]) -> None:
    cores, gpus = (ray.cluster_resources().get(name, 0) for name in ("CPU", "GPU"))
    for config in runs:
        if _processors(config) > cores:
            asked = f"training.num_threads is {_threads(config)}"
            if config.training.num_processes is not None:
                asked += f" and training.num_processes {config.training.num_processes}"
            raise InputError(
                f"{config.name}: {asked}, this machine has {cores:g} cores; lower that, or give the address of a Ray cluster"
            )
        if _needs(config, gpus)["GPU"] > gpus:
            raise InputError(
                f'{config.name}: training.device is "{config.training.device}", Ray finds no GPU on this machine; use "auto", '
                "or give the address of a Ray cluster"
            )


@contextlib.contextmanager
def _ray(address: str | None) -> Iterator[bool]:
    """Yields whether Ray was started on this machine."""
    with ray_start.joining(address) as options:
        ray.init(**options)
    try:
        yield options["address"] == ray_start.LOCAL
    finally:
        ray.shutdown()
