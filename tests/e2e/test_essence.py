"""The experiment of deploy/local, end to end at a small size: every command, real Ray, a page. (CI runs the demo whole.)"""

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
SPEECHOCEAN762 = Path(os.environ.get("SPEECHOCEAN762", REPOSITORY.parent / "shared" / "data" / "speechocean762"))


@pytest.mark.ray
@pytest.mark.timeout(3600)
@pytest.mark.skipif(
    not (Path(sys.executable).parent / "teacher-service").exists(),
    reason="the package is not installed in this environment (make test does), so its commands do not exist",
)
@pytest.mark.skipif(
    not SPEECHOCEAN762.exists(), reason=f"speechocean762 is not at {SPEECHOCEAN762} (set SPEECHOCEAN762 to its folder)"
)
def test_essence(tmp_path: Path) -> None:
    """Teachers of folds, labels of all classes, settings chosen on dev speech, the cheapest question, and the page."""
    output = tmp_path / "essence"
    # Two speakers in each split: with one, a fold without them has no dev speech.
    less = ("--epochs", "1", "--seeds", "1", "--utterances", "16", "--teachers", "1", "--trials", "2")

    def essence(*options: str) -> subprocess.CompletedProcess[str]:
        script = REPOSITORY / "deploy" / "local" / "essence.py"
        words = [sys.executable, script, SPEECHOCEAN762, output, *options, "--question", "longer"]
        return subprocess.run(words, capture_output=True, text=True, check=False)

    finished = essence(*less)
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]
    # What is there was made with one epoch: none of it is an answer to this.
    refused = essence(*less, "--epochs", "2")
    assert refused.returncode == 2
    assert (
        f"{output} holds the experiment with --epochs 1, now 2; give what it has, or use another output folder"
        in refused.stderr
    )
    corpus = load_corpus(output / "corpus.parquet")
    assert corpus.hard_label_frame_shift_ms == 30.0
    speakers = corpus.table.select(["split", "speaker"]).group_by(["split", "speaker"]).aggregate([])
    assert set(speakers["split"].to_pylist()) == {*(f"train-{part}" for part in (1, 2, 3, 4)), "dev", "test"}
    assert len(speakers) == len(set(speakers["speaker"].to_pylist())), "a speaker is in two splits"
    labels = open_dataset(output / "labels-train").manifest.spec
    assert [teacher.fold for teacher in labels.teachers] == [0, 1, 2, 3]
    assert labels.selection.cap == labels.num_classes
    (question,) = load_records(output / "speechocean762.json")
    (tuning,) = load_records(output / "speechocean762-settings.json")
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
    teacher = json.loads((output / "teachers" / "tdnn-100-without-0" / "run.json").read_bytes())["config"]
    precisions = {each["training"]["precision"] for each in (run, teacher)}
    assert precisions == {json.loads((output / "size.json").read_bytes())["precision"]}
    temperature, rate = run["soft_labels"]["temperature"], run["training"]["learning_rate"]
    assert best.arm == f"soft-weight-1-temperature-{temperature:g}-learning_rate-{rate:g}"
    page = (output / "speechocean762.md").read_text(encoding="utf-8")
    assert "## Can a student pass its teachers, with twice the budget?" in page
    assert (output / "speechocean762-1.svg").exists()
