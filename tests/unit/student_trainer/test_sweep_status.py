"""The line that says how far a sweep is."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from student_trainer import sweep_status
from student_trainer.run_folder import RUN, RunFolder
from student_trainer.sweep_config import Sweep, load_sweep
from student_trainer.sweep_status import SweepStatus
from tests.support.sweeps import write_sweep


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    return load_sweep(write_sweep(tmp_path, "sweep"))


def trained(sweep: Sweep, index: int, seconds: list[float]) -> None:
    folder = RunFolder(sweep.runs[index].output)
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.write_json(RUN, {"history": [{"epoch": epoch, "seconds": each} for epoch, each in enumerate(seconds, 1)]})


def test_nothing_done(sweep: Sweep) -> None:
    status = SweepStatus(sweep.runs)
    assert status.line(num_slots=2, num_failed=0, seconds=1) == "sweep: 0/4 runs done, 2 in work, 2 waiting"


def test_the_time_left_is_that_of_each_arms_epochs(sweep: Sweep) -> None:
    # hard-0 is done at 10 s an epoch, top-2-0 has 2 of 12 epochs at 20 s, the other two have not begun.
    trained(sweep, 0, [10.0] * 12)
    status = SweepStatus(sweep.runs)
    trained(sweep, 1, [20.0] * 2)
    status.done(sweep.runs[0])
    status.show(num_slots=2, num_failed=0)
    line = status.line(num_slots=2, num_failed=1, seconds=60)
    # (10 * 20 + 12 * 10 + 12 * 20) s on two slots; what was trained before the start is not in the rate.
    assert line == "sweep: 1/4 runs done, 2 in work, 1 waiting, 1 failed, 2.0 epochs/min, 5 min left"


def test_evaluation_counts_too(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(sweep_status, "time", SimpleNamespace(monotonic=lambda: now))
    # Begun and finished before: how long it was at work is not known.
    trained(sweep, 0, [10.0] * 12)
    status = SweepStatus(sweep.runs)
    status.done(sweep.runs[0])
    trained(sweep, 1, [])
    now = 20.0
    status.show(num_slots=1, num_failed=0)
    trained(sweep, 1, [10.0] * 12)
    now = 20.0 + 12 * 10 + 90
    status.done(sweep.runs[1])
    line = status.line(num_slots=1, num_failed=0, seconds=now)
    # Two runs of 12 epochs at 10 s and 90 s besides.
    assert line == "sweep: 2/4 runs done, 1 in work, 1 waiting, 3.1 epochs/min, 7 min left"


def test_no_node_has_room(sweep: Sweep) -> None:
    line = SweepStatus(sweep.runs).line(num_slots=0, num_failed=0, seconds=10.0)
    assert line == "sweep: 0/4 runs done, 0 in work, 4 waiting for room on the cluster"


def test_all_done(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    with SweepStatus(sweep.runs) as status:
        for run in sweep.runs:
            status.done(run)
        status.show(num_slots=2, num_failed=0)
    assert capsys.readouterr().err == "sweep: 4/4 runs done, 0 in work, 0 waiting\n"
