"""Workers: throughput of one actor and of two on Ray, and the driver's CPU for each shard and for each actor.

    python -m tests.benchmarks.workers            # about five minutes
    python -m tests.benchmarks.workers --json

Every run is ``run_job`` in a process of its own, on a Ray of this machine (loopback). Throughput is by the times of the commit
records, once each actor may have made one. The driver's CPU is that of its process, the difference of two runs that differ in
their shards alone; Ray's own daemons are not in it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from teacher_service.config import TeacherConfig
from teacher_service.job import prepare
from teacher_service.ray_job import run_job
from tests.benchmarks.command_line import benchmark_parser, print_figures
from tests.benchmarks.figures import Figure, interleaved, median_and_spread
from tests.benchmarks.job import (
    INVENTORY,
    commit_times,
    steady_rate,
    write_benchmark_corpus,
    write_teachers,
    write_waiting_teacher,
)
from tests.support.teachers import make_job

# Of 1,000,000 hours in 25,000 shards, at a thousand times real time.
_SECONDS_PER_SHARD = 144.0
_ACTORS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """``rate``: seconds of speech per second."""

    rate: float
    driver_cpu: float


def figures(*, num_shards: int = 8, shard_seconds: float = 60.0, many: int = 120, repeats: int = 3) -> list[Figure]:
    """
    Args:
        num_shards, shard_seconds: of the runs whose throughput is compared.
        many: shards of half a second each in the run that the driver's CPU for a shard is taken from.
    """
    with tempfile.TemporaryDirectory(prefix="workers-") as name:
        folder = Path(name)
        found = [_scaling(folder / "scaling", num_shards, shard_seconds, repeats)]
        return found + _driver(folder / "driver", many, repeats)


def _scaling(folder: Path, num_shards: int, shard_seconds: float, repeats: int) -> Figure:
    folder.mkdir()
    manifest = write_benchmark_corpus(folder / "sounds", [10.0] * round(num_shards * shard_seconds / 10))
    teachers = [each.model_dump(mode="json", exclude_none=True) for each in write_teachers(folder)]
    job = {"manifest": manifest, "teachers": teachers, "shard_seconds": shard_seconds}
    one, two = interleaved([lambda: run(folder, job, 1).rate, lambda: run(folder, job, 2).rate], repeats)
    return scaling_figure(one, two)


def scaling_figure(one: list[float], two: list[float]) -> Figure:
    """Of the rates of one actor and of two."""
    value, spread = median_and_spread(two)
    of_one, _ = median_and_spread(one)
    return Figure(
        name="workers: throughput of 2 actors",
        unit="s of speech/s",
        value=value,
        baseline=2 * of_one,
        baseline_name="twice that of 1 actor",
        spread=spread,
        note="two actors on two cores leave none for Ray's daemons and the driver",
    )


def _driver(folder: Path, many: int, repeats: int) -> list[Figure]:
    """From runs of many shards and of four, by a teacher that takes as long for each batch."""
    folder.mkdir()
    manifest = write_benchmark_corpus(folder / "sounds", [0.5] * many)
    waiting = write_waiting_teacher(folder)[0].model_dump(mode="json", exclude_none=True)
    long = {"manifest": manifest, "teachers": [waiting], "shard_seconds": 0.5}
    few = {**long, "shard_seconds": 0.5 * many / 4}

    def slope() -> float:
        of_many, of_few = run(folder, long, 2), run(folder, few, 2)
        # What the longer run costs by lasting longer is in it: an upper bound.
        return 1000 * (of_many.driver_cpu - of_few.driver_cpu) / (many - 4)

    return driver_figures(interleaved([slope], repeats)[0])


def driver_figures(milliseconds: list[float]) -> list[Figure]:
    """Of the driver's CPU for a shard."""
    value, spread = median_and_spread(milliseconds)
    rate = 1000 / value if value > 0 else float("inf")
    needed = _ACTORS / _SECONDS_PER_SHARD
    return [
        Figure(
            name="workers: CPU of the driver for a shard",
            unit="ms",
            value=value,
            spread=spread,
            note="2 actors, half a second to a shard: waiting for it is counted in",
        ),
        Figure(
            name=f"workers: shards/s that the driver could hand out, for {_ACTORS:,} actors",
            unit="shards/s",
            value=rate,
            baseline=needed,
            baseline_name=f"{_ACTORS:,} actors, {_SECONDS_PER_SHARD:g} s to a shard",
            target="ratio >= 1",
            met=rate >= needed,
            note="extrapolated from the figure above",
        ),
    ]


def run(folder: Path, job: dict[str, Any], num_actors: int) -> Run:
    """In a process of its own."""
    with tempfile.TemporaryDirectory(dir=folder) as labels:
        call = json.dumps({**job, "url": f"{labels}/labels", "num_actors": num_actors})
        done = subprocess.run(
            [sys.executable, "-m", "tests.benchmarks.workers", "--child", call],
            check=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        return Run(**json.loads(done.stdout.splitlines()[-1]))


def _child(call: dict[str, Any]) -> Run:
    config = make_job(
        call["manifest"],
        [TeacherConfig(**teacher) for teacher in call["teachers"]],
        call["url"],
        destination__shard_seconds=call["shard_seconds"],
        resources__num_actors=call["num_actors"],
        resources__batch_seconds=30.0,
    )
    job = prepare(config)
    assert job.inventory.num_classes == INVENTORY.num_classes
    cpu = time.process_time()
    run_job(job)
    cpu = time.process_time() - cpu
    ends = commit_times(Path(call["url"]) / "commits")
    return Run(rate=steady_rate(job.seconds_of_shard, ends, call["num_actors"]), driver_cpu=cpu)


def main() -> None:
    parser = benchmark_parser(__doc__, repeats=3)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(asdict(_child(json.loads(options.child)))))
        return
    print_figures(figures(repeats=options.repeats), as_json=options.json)


if __name__ == "__main__":
    main()
