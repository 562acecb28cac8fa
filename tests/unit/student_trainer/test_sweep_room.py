"""What a run of a sweep asks of Ray, and what becomes of one that no node has room for; without Ray."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from softlabel_schemas import InputError
from student_trainer import sweep_ray
from student_trainer.config import TrainConfig
from student_trainer.sweep_config import load_sweep
from tests.support.sweeps import write_sweep


@pytest.fixture
def runs(tmp_path: Path) -> tuple[TrainConfig, ...]:
    return load_sweep(write_sweep(tmp_path, "sweep", seeds=[0])).runs


def on(config: TrainConfig, device: str, num_threads: int = 1) -> TrainConfig:
    training = config.training.model_copy(update={"device": device, "num_threads": num_threads})
    return config.model_copy(update={"training": training})


@pytest.mark.parametrize(
    ("device", "num_gpus", "asked"), [("auto", 0, 0), ("auto", 2, 1), ("cpu", 2, 0), ("cuda", 2, 1), ("cuda", 0, 1)]
)
def test_each_run_asks_for_a_gpu_where_it_would_use_one(
    runs: tuple[TrainConfig, ...], device: str, num_gpus: int, asked: int
) -> None:
    assert sweep_ray._needs(on(runs[0], device, 3), num_gpus) == {"CPU": 3, "GPU": asked}


def test_each_run_asks_for_the_processes_that_make_its_batches(
    runs: tuple[TrainConfig, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    training = runs[0].training.model_copy(update={"num_threads": 2, "num_processes": 3})
    config = runs[0].model_copy(update={"training": training})
    assert sweep_ray._needs(config, 0) == {"CPU": 5, "GPU": 0}
    monkeypatch.setattr(sweep_ray, "ray", SimpleNamespace(cluster_resources=lambda: {"CPU": 4.0}))
    with pytest.raises(
        InputError, match=r"num_threads is 2 and training\.num_processes 3, this machine has 4 cores; lower"
    ):
        sweep_ray._check_room([config])


@pytest.mark.parametrize(
    ("waiting", "nodes", "expected"),
    [
        ([(1, 0)], [(16, 0)], 16),
        ([(1, 0), (4, 0)], [(16, 0), (6, 0)], 5),
        ([(1, 1)], [(16, 2), (16, 0)], 2),
        # Of 32 cores in all.
        ([(32, 0)], [(16, 0), (16, 0)], 0),
        ([(1, 1)], [(16, 0)], 0),
        ([(32, 0), (8, 0)], [(16, 0), (16, 0)], 4),
        # Either fits, but not a run that needs the most of both.
        ([(16, 0), (1, 1)], [(16, 0), (2, 1)], 1),
        ([], [(16, 0)], 0),
    ],
)
def test_slots_are_those_of_single_nodes(
    waiting: list[tuple[int, int]], nodes: list[tuple[int, int]], expected: int
) -> None:
    needed, given = ([dict(zip(("CPU", "GPU"), each, strict=True)) for each in of] for of in (waiting, nodes))
    assert sweep_ray._num_slots(needed, given) == expected


def test_runs_that_no_node_has_room_for_fail_in_the_end(
    runs: tuple[TrainConfig, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two runs one fits; the other is waited for in vain, and what the first made is compared."""
    clock = iter(range(0, 10**6, 60))
    cancelled: list[Any] = []
    rounds: list[int] = []

    def wait(references: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        rounds.append(len(references))
        ready = [reference for reference in references if reference == "small" and len(rounds) == 100]
        return ready, references

    cluster = SimpleNamespace(
        wait=wait,
        get=lambda _: None,
        cancel=cancelled.append,
        nodes=lambda: [
            {"Alive": True, "Resources": {"CPU": 16.0}},
            {"Alive": False, "Resources": {"CPU": 64.0}},
        ],
    )
    monkeypatch.setattr(sweep_ray, "ray", cluster)
    monkeypatch.setattr(sweep_ray, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    needs = {runs[0].output: {"CPU": 1, "GPU": 0}, runs[1].output: {"CPU": 32, "GPU": 0}}
    failures = sweep_ray._collect({"small": runs[0], "large": runs[1]}, runs, needs)
    assert list(failures) == [runs[1].output]
    assert failures[runs[1].output].startswith(
        "no node of the Ray cluster had 32 CPU and 0 GPU for this run within 30 min;"
    )
    assert cancelled == ["large"]
    # However long the first took.
    assert 100 + 30 <= len(rounds) <= 100 + 32
