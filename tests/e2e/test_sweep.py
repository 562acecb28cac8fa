"""``student-trainer sweep`` on a real local Ray, words included: interrupted and resumed, as if nothing had been; a failing
arm; CTC."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from student_trainer.compare import compare
from student_trainer.sweep_config import Sweep, load_sweep
from student_trainer.sweep_records import SweepRecords, load_records, sweep_records
from student_trainer.sweep_task import LOG, evaluate_ensemble, train_and_evaluate
from tests.support.processes import descendants, finish, gone, listening_addresses
from tests.support.sweeps import write_ctc, write_sweep, write_words

ROOT = Path(__file__).parents[2]
# Known only once the model is built.
FAILING = """
[[arms]]
name = "broken"
seeds = [0]
model = { arguments = { hiden = 16 } }
"""
LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    write_words(folder)
    return folder


def start(path: Path, *before: str) -> subprocess.Popen[str]:
    """``before``: a command that becomes it."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    paths = [str(ROOT), str(ROOT / "schemas"), environment.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [*before, sys.executable, "-m", "student_trainer.cli", "sweep", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment | {"PYTHONPATH": os.pathsep.join(paths)},
    )


def interrupt_in_the_middle(process: subprocess.Popen[str], sweep: Sweep, how: signal.Signals) -> set[int]:
    """Once a run has trained an epoch; returns the processes there were. They listen on loopback alone."""
    while process.poll() is None and not any((Path(run.output) / "checkpoint.pt").exists() for run in sweep.runs):
        time.sleep(0.02)
    process.send_signal(how)
    processes = descendants(process.pid)
    assert listening_addresses(processes) <= LOOPBACK
    return processes


def without_ray(path: Path) -> SweepRecords:
    """The same, or what is left of it, in one go; its records."""
    sweep = load_sweep(path)
    for run in sweep.runs:
        train_and_evaluate(run, sweep.evaluate)
    ensemble = evaluate_ensemble(sweep)
    assert ensemble is not None
    runs = [run.output for arm in sweep.arms for run in sweep.runs if run.name == arm]
    datasets = [url for run in sweep.runs if run.soft_labels for url in run.soft_labels.locations]
    return sweep_records(compare(runs, [ensemble], datasets, sweep.evaluate.splits), sweep)


def num_epochs(sweep: Sweep) -> list[int]:
    found = [Path(run.output) / "run.json" for run in sweep.runs]
    return [len(json.loads(path.read_bytes())["history"]) if path.exists() else 0 for path in found]


@pytest.mark.ray
@pytest.mark.timeout(1800)
def test_interrupted_and_resumed_with_a_failing_arm(folder: Path) -> None:
    path = write_sweep(folder, "disturbed", arms=FAILING, words=True)
    sweep = load_sweep(path)
    process = start(path)
    processes = interrupt_in_the_middle(process, sweep, signal.SIGINT)
    code, printed, _ = finish(process)
    assert all(gone(pid) for pid in processes)
    assert code == 130, printed
    assert 0 < sum(num_epochs(sweep)) < 4 * sweep.runs[0].training.epochs
    logs = [(Path(run.output) / LOG).read_text() for run in sweep.runs if (Path(run.output) / LOG).exists()]
    assert any("the same command goes on from there" in log for log in logs)
    assert not (sweep.output / "sweep.json").exists()
    features = sweep.output / "shared-features"
    assert len(list(features.iterdir())) >= 1

    code, printed, _ = finish(start(path))
    assert code == 1, printed
    assert "1 of 5 runs failed" in printed
    assert "broken-0" in printed
    assert "hiden" in printed
    # Of training, dev and test speech, for the run that failed.
    assert len(list(features.iterdir())) == 3
    # Training's own lines are in the logs.
    assert "train hard" not in printed
    assert "<html" in (sweep.output / "report.html").read_text(encoding="utf-8")
    found = load_records(sweep.output / "sweep.json")[0]
    assert {record.seed for record in found.records} == {0, 1, None}
    assert {(record.arm, record.against) for record in found.differences} == {
        ("top-2", "hard"),
        ("top-2", "ensemble"),
    }
    # Of the first seed, whose runs were interrupted.
    expected = without_ray(write_sweep(folder, "undisturbed", seeds=[0], words=True)).records
    decoded = [record.arm for record in expected if record.metric == "word_error_rate"]
    assert decoded == ["hard", "top-2", "ensemble"]
    assert tuple(record for record in found.records if record.seed != 1) == expected
    for run in sweep.runs[:2]:
        name = Path(run.output).name
        weights = (Path(run.output) / "model.safetensors").read_bytes()
        assert weights == (folder / "undisturbed" / "runs" / name / "model.safetensors").read_bytes()

    path.write_text(path.read_text().replace(FAILING, ""))
    code, printed, _ = finish(start(path))
    assert code == 0, printed
    assert not features.exists()


@pytest.mark.ray
@pytest.mark.timeout(1800)
def test_ctc_terminated_and_resumed(tmp_path: Path) -> None:
    """SIGTERM, with which clusters stop a job, is as Ctrl-C, also where Ctrl-C itself is ignored, as in what a script begins
    with ``nohup ... &``; what it leaves is ended without Ray."""
    write_ctc(tmp_path)
    path = write_sweep(tmp_path, "sweep", seeds=[0], ctc=True)
    sweep = load_sweep(path)
    process = start(path, "sh", "-c", 'trap "" INT; exec "$@"', "sh")
    processes = interrupt_in_the_middle(process, sweep, signal.SIGTERM)
    code, printed, _ = finish(process)
    assert all(gone(pid) for pid in processes), "Ray is left running"
    assert code == 130, printed
    assert 0 < sum(num_epochs(sweep)) < 2 * sweep.runs[0].training.epochs

    found = without_ray(path)
    assert [(record.arm, record.seed, record.metric) for record in found.records] == [
        ("hard", 0, "token_error_rate"),
        ("top-2", 0, "token_error_rate"),
        ("ensemble", None, "token_error_rate"),
    ]
    for record in found.records:
        where = "ensemble.json" if record.seed is None else f"runs/{record.arm}-0/evaluation-test.json"
        assert record.value == json.loads((sweep.output / where).read_bytes())["token_error_rate"]
    assert [(each.arm, each.against, each.metric) for each in found.differences] == [
        ("top-2", "hard", "token_error_rate"),
        ("top-2", "ensemble", "token_error_rate"),
    ]
