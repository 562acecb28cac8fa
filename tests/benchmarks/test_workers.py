"""The benchmark of workers at a small size: one run on Ray, and the figures made of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.job import write_benchmark_corpus, write_waiting_teacher
from tests.benchmarks.workers import driver_figures, run, scaling_figure

pytestmark = pytest.mark.ray


def test_a_run_and_its_figures(tmp_path: Path) -> None:
    manifest = write_benchmark_corpus(tmp_path / "sounds", [0.5] * 4)
    teachers = [each.model_dump(mode="json", exclude_none=True) for each in write_waiting_teacher(tmp_path)]
    measured = run(tmp_path, {"manifest": manifest, "teachers": teachers, "shard_seconds": 0.5}, 1)
    # The teacher waits for half a second in each shard of as much speech.
    assert 0 < measured.rate < 2
    assert measured.driver_cpu > 0
    assert scaling_figure([1.0, 2.0, 3.0], [3.0]).ratio == 0.75
    cpu, rate = driver_figures([10.0, 20.0, 30.0])
    assert (cpu.value, rate.value) == (20.0, 50.0)
    assert rate.met
