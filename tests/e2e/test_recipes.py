"""The recipes of deploy/local, end to end at a small size: every command, real Ray, a report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from softlabel_schemas import load_corpus, open_dataset
from student_trainer.sweep_records import load_records

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPES = REPOSITORY / "deploy" / "local"
SPEECHOCEAN762 = Path(os.environ.get("SPEECHOCEAN762", REPOSITORY.parent / "shared" / "data" / "speechocean762"))
needs_commands = pytest.mark.skipif(
    not (Path(sys.executable).parent / "teacher-service").exists(),
    reason="the package is not installed in this environment (make test does), so its commands do not exist",
)


def run_recipe(name: str, *arguments: str) -> str:
    finished = subprocess.run(
        [sys.executable, RECIPES / name, *arguments], capture_output=True, text=True, timeout=900, check=False
    )
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]
    return finished.stdout


@pytest.mark.ray
@pytest.mark.timeout(900)
@needs_commands
def test_demo(tmp_path: Path) -> None:
    pytest.importorskip(
        "espeakng_loader", reason="the demo's synthesiser is an extra: pip install essence-distill[demo]"
    )
    output = tmp_path / "demo"
    printed = run_recipe("demo.py", str(output), "--sentences", "16", "--epochs", "1", "--seeds", "1")
    assert "student-essence" in printed
    assert "ensemble" in printed
    assert str(output / "report.html") in printed
    assert "<html" in (output / "report.html").read_text(encoding="utf-8")
    dataset = open_dataset(output / "labels-train")
    assert len(dataset) == 16
    assert len(dataset.manifest.spec.teachers) == 3
    train = json.loads((output / "runs" / "student-essence-0" / "run.json").read_text(encoding="utf-8"))
    assert train["dataset_digest"] == dataset.manifest.content_digest


needs_speechocean762 = pytest.mark.skipif(
    not SPEECHOCEAN762.exists(), reason=f"speechocean762 is not at {SPEECHOCEAN762} (set SPEECHOCEAN762 to its folder)"
)


@pytest.mark.ray
@pytest.mark.timeout(900)
@needs_commands
@needs_speechocean762
def test_essence(tmp_path: Path) -> None:
    """Teachers of folds, labels of all classes, settings chosen on dev speech, the cheapest question, and the page."""
    output = tmp_path / "essence"
    # Two speakers in each split: with one, a fold without them has no dev speech.
    size = ("--epochs", "1", "--seeds", "1", "--utterances", "16", "--teachers", "1", "--question", "longer")
    run_recipe("essence.py", str(SPEECHOCEAN762), str(output), *size)
    corpus = load_corpus(output / "corpus.parquet")
    assert corpus.hard_label_frame_shift_ms == 30.0
    speakers = corpus.table.select(["split", "speaker"]).group_by(["split", "speaker"]).aggregate([])
    assert set(speakers["split"].to_pylist()) == {*(f"train-{part}" for part in (1, 2, 3, 4)), "dev", "test"}
    assert len(speakers) == len(set(speakers["speaker"].to_pylist())), "a speaker is in two splits"
    labels = open_dataset(output / "labels-train").manifest.spec
    assert [teacher.fold for teacher in labels.teachers] == [0, 1, 2, 3]
    assert labels.selection.cap == labels.num_classes
    question, tuning = load_records(output / "speechocean762.json")
    assert (question.splits, tuning.splits) == (("test",), ("dev",))
    assert {record.arm for record in question.records} == {
        *("hard", "all-soft", "essence", "hard-augmented", "essence-augmented", "ensemble")
    }
    # Each kind of arm has the settings of its best trial.
    best = min(
        (record for record in tuning.records if record.metric == "frame_error_rate" and record.labels == "soft"),
        key=lambda record: record.value,
    )
    run = json.loads((output / "longer" / "runs" / "all-soft-0" / "run.json").read_bytes())["config"]
    temperature, rate = run["soft_labels"]["temperature"], run["training"]["learning_rate"]
    assert best.arm == f"soft-weight-1-temperature-{temperature:g}-learning_rate-{rate:g}"
    page = (output / "speechocean762.md").read_text(encoding="utf-8")
    assert "## Can a student pass its teachers, with twice the budget?" in page
    assert (output / "speechocean762-1.svg").exists()
