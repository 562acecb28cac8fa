"""Flat records of a sweep, and the page that is made from them alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from softlabel_schemas import InputError, open_dataset
from student_trainer.cli import main
from student_trainer.compare import compare
from student_trainer.sweep_config import load_sweep
from student_trainer.sweep_records import SweepRecords, load_records, records_json, sweep_records
from student_trainer.sweep_task import evaluate_ensemble, train_and_evaluate
from tests.support.speech import write_soft_labels, write_speech
from tests.support.sweeps import write_sweep


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> SweepRecords:
    """Of a sweep of one epoch, made without Ray."""
    folder = tmp_path_factory.mktemp("records")
    speech = write_speech(folder)
    write_soft_labels(folder / "labels", speech.split("train"))
    write_soft_labels(folder / "labels-test", speech.split("test"))
    path = write_sweep(folder, "sweep")
    path.write_text(
        path.read_text().replace("epochs = 30", "epochs = 1").replace("batch_seconds = 0.3", "batch_seconds = 3")
    )
    sweep = load_sweep(path)
    for run in sweep.runs:
        train_and_evaluate(run, sweep.evaluate)
    ensemble = evaluate_ensemble(sweep)
    assert ensemble is not None
    runs = [run.output for arm in sweep.arms for run in sweep.runs if run.name == arm]
    made = sweep_records(compare(runs, [ensemble], [str(folder / "labels")], ("test",)), sweep)
    dataset = open_dataset(folder / "labels")
    of_soft = [record for record in made.records if record.arm == "top-2"]
    assert {record.dataset_digest for record in of_soft} == {dataset.manifest.content_digest}
    sizes = {record.dataset_bytes_per_frame for record in of_soft}
    assert sizes == {dataset.manifest.num_bytes / dataset.manifest.num_frames}
    for record in of_soft:
        # Of three classes two are left, and the hard label where it is not one of them.
        assert record.labels_bytes_per_frame is not None
        assert record.dataset_bytes_per_frame is not None
        assert record.labels_bytes_per_frame < record.dataset_bytes_per_frame
        evaluation = json.loads(
            (Path(sweep.output) / "runs" / f"top-2-{record.seed}" / "evaluation-test.json").read_text()
        )
        assert record.value == evaluation[record.metric]
    return made


def test_one_record_for_each_arm_seed_and_metric(records: SweepRecords) -> None:
    keys = [(record.arm, record.seed) for record in records.records if record.metric == "frame_error_rate"]
    assert keys == [("hard", 0), ("hard", 1), ("top-2", 0), ("top-2", 1), ("ensemble", None)]
    assert len({(record.arm, record.seed, record.metric) for record in records.records}) == len(records.records)
    labels = {record.arm: record.labels for record in records.records}
    assert labels == {"hard": "hard", "top-2": "hard+soft", "ensemble": None}
    # A digest for each arm and seed.
    assert len({record.config_digest for record in records.records}) == 5
    assert {record.unit for record in records.records if record.metric == "cross_entropy"} == {"nats per frame"}


def test_differences_are_of_the_mean_over_seeds_and_count_seeds(records: SweepRecords) -> None:
    values: dict[str, list[float]] = {}
    for record in records.records:
        if record.metric == "frame_error_rate":
            values.setdefault(record.arm, []).append(record.value)
    for found in records.differences:
        if found.metric != "frame_error_rate":
            continue
        left, right = values[found.arm], values[found.against]
        right = right * 2 if found.against == "ensemble" else right
        assert found.difference == pytest.approx(sum(left) / 2 - sum(right) / 2)
        assert found.better_seeds == sum(a < b for a, b in zip(left, right, strict=True))
        assert found.num_seeds == 2
    assert {found.against for found in records.differences} == {"hard", "ensemble"}


def test_nothing_of_this_machine_is_recorded(records: SweepRecords, tmp_path: Path) -> None:
    text = records_json([records])
    assert str(tmp_path.parent) not in text
    (tmp_path / "sweep.json").write_text(text, encoding="utf-8")
    assert load_records(tmp_path / "sweep.json") == (records,)
    assert len(text.splitlines()) == len(records.records) + len(records.differences) + 10


def results(*arguments: str) -> str:
    outcome = CliRunner().invoke(main, ["results", *arguments])
    assert outcome.exit_code == 0, outcome.output
    return outcome.output


def test_the_page_is_made_again_from_its_own_records(records: SweepRecords, tmp_path: Path) -> None:
    other = records.model_copy(update={"title": "How much is enough?"})
    (tmp_path / "a.json").write_text(records_json([records]), encoding="utf-8")
    (tmp_path / "b.json").write_text(records_json([other]), encoding="utf-8")
    printed = results(
        str(tmp_path / "a.json"), str(tmp_path / "b.json"), "--output", str(tmp_path / "page" / "speech.md")
    )
    names = ["speech.json", "speech-1.svg", "speech-2.svg", "speech.md"]
    assert [Path(line).name for line in printed.splitlines()] == names
    page = (tmp_path / "page" / "speech.md").read_text(encoding="utf-8")
    assert "## How much is enough?" in page
    # A table row of each arm, in both sections.
    assert page.count("| hard | hard | 2 | 2,118 | – |") == 2
    assert page.count("| top-2 | hard | frame |") == 2
    assert "speech-2.svg" in page
    first = {name: (tmp_path / "page" / name).read_bytes() for name in names}
    results(str(tmp_path / "page" / "speech.json"), "--output", str(tmp_path / "again" / "speech.md"))
    assert {name: (tmp_path / "again" / name).read_bytes() for name in names} == first


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist; student-trainer sweep makes it"),
        ("{", "is not JSON"),
        ({"version": 2, "sweeps": []}, "version"),
        ({"version": 1, "sweeps": [], "more": 1}, "unknown key 'more'"),
    ],
)
def test_files_that_are_no_records(tmp_path: Path, content: Any, message: str) -> None:
    if content is not None:
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "sweep.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        load_records(tmp_path / "sweep.json")
