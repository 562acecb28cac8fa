"""Flat records of a sweep."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from softlabel_schemas import InputError, open_dataset
from softlabel_schemas.command_line import CheckFailedError
from softlabel_schemas.selection import TopK
from student_trainer import sweep as sweep_module
from student_trainer.compare import Comparison, compare
from student_trainer.run_folder import RunFolder
from student_trainer.sweep import run_sweep
from student_trainer.sweep_config import Sweep, load_sweep
from student_trainer.sweep_records import SweepRecords, load_records, not_compared, records_json, sweep_records
from student_trainer.sweep_task import evaluate_ensemble, train_and_evaluate
from tests.support.records import difference_record, make_records
from tests.support.runs import ENSEMBLE, HARD, SOFT, evaluation, write_run
from tests.support.speech import write_soft_labels, write_speech
from tests.support.sweeps import write_sweep

# Half way between HARD and SOFT in every utterance, in the mean over its seeds; 5 frames fewer than HARD, but not everywhere.
HALF = ((40, 72, 35, 35), (40, 73, 35, 35))
BY_CHANCE = ((55, 70, 40, 40),) * 3
NAMELESS = make_records({}, {}).model_dump(mode="json") | {
    "differences": [difference_record("essence", "hard", -1.0).model_dump(mode="json")]
}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> SweepRecords:
    """Of a sweep of one epoch, made without Ray."""
    folder = tmp_path_factory.mktemp("records")
    speech = write_speech(folder)
    write_soft_labels(folder / "labels", speech.split("train"))
    write_soft_labels(folder / "labels-test", speech.split("test"))
    path = write_sweep(folder, "sweep", epochs=1)
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


def rerun(path: Path) -> tuple[Comparison, SweepRecords]:
    """As ``run_sweep`` does, without Ray."""
    sweep = load_sweep(path)
    for run in sweep.runs:
        train_and_evaluate(run, sweep.evaluate)
    made = sweep_module._compare(sweep, ())
    assert not_compared(made, sweep) == []
    return made, sweep_records(made, sweep)


def test_a_sweep_that_was_moved_and_an_arm_that_was_renamed(tmp_path: Path) -> None:
    """Finished runs name paths and an arm as they were; none of these is looked at."""
    speech = write_speech(tmp_path / "before")
    write_soft_labels(speech.folder / "labels", speech.split("train"))
    write_soft_labels(speech.folder / "labels-test", speech.split("test"))
    _, before = rerun(write_sweep(speech.folder, "sweep", seeds=[0], epochs=1))
    speech.folder.rename(tmp_path / "after")
    path = tmp_path / "after" / "sweep.toml"
    # What lies there now are other labels.
    write_soft_labels(tmp_path / "before" / "labels", speech.split("train"), selection=TopK(k=1))
    _, moved = rerun(path)
    assert moved == before
    path.write_text(path.read_text().replace("top-2", "few"))
    runs = tmp_path / "after" / "sweep" / "runs"
    (runs / "top-2-0").rename(runs / "few-0")
    made, renamed = rerun(path)
    assert [arm.name for arm in made.arms] == ["hard", "few", "ensemble"]
    assert {(each.arm, each.against) for each in renamed.differences} == {("few", "hard"), ("few", "ensemble")}


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


def comparison(tmp_path: Path) -> Comparison:
    """Errors of 42, 31 and, in every utterance half way between, 36.5 percent; and one arm that gains by chance alone."""
    arms = {"hard": HARD, "soft": SOFT, "half": HALF, "by-chance": BY_CHANCE}
    runs = [
        write_run(tmp_path / f"{name}-{seed}", name, errors, seed=seed, dataset=None if name == "hard" else "d" * 64)
        for name, of_arm in arms.items()
        for seed, errors in enumerate(of_arm)
    ]
    return compare(runs, [], [], ["test"])


def sweep_of(tmp_path: Path, gain: tuple[str, str] | None) -> Sweep:
    write_sweep(tmp_path, "sweep")
    return replace(load_sweep(tmp_path / "sweep.toml"), pairs=(), gain=gain)


def test_the_share_of_a_gain_that_an_arm_keeps(tmp_path: Path) -> None:
    found = sweep_records(comparison(tmp_path), sweep_of(tmp_path, ("hard", "soft")))
    assert [(gain.arm, gain.baseline, gain.reference) for gain in found.gains] == [
        ("half", "hard", "soft"),
        ("by-chance", "hard", "soft"),
    ]
    # Half of the gain in every utterance.
    assert (found.gains[0].kept, found.gains[0].low, found.gains[0].high) == pytest.approx((50.0, 50.0, 50.0))
    assert [(each.arm, each.against) for each in found.differences].count(("soft", "hard")) == 1
    (tmp_path / "sweep.json").write_text(records_json([found]), encoding="utf-8")
    assert load_records(tmp_path / "sweep.json") == (found,)


def test_pairs_of_other_utterances_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The ensemble's dataset skipped one of four: its pairs are not in the file, and the command says so."""
    runs = [write_run(tmp_path / name, name, HARD[0]) for name in ("hard", "top-2")]
    found = evaluation("ensemble", ENSEMBLE, kind="ensemble")
    skipped = {"utterance_id": found["utterances"].pop()["utterance_id"], "reason": "broken"}
    RunFolder(tmp_path).write_json("ensemble.json", found | {"left_out": [skipped]})
    path = write_sweep(tmp_path, "sweep", seeds=[0])
    path.write_text(path.read_text().replace('[["top-2", "ensemble"]]', '[["top-2", "ensemble"], ["top-2", "hard"]]'))
    made = compare(runs, [str(tmp_path / "ensemble.json")], [], ["test"])
    monkeypatch.setattr(sweep_module, "check_evaluation", lambda _: None)
    monkeypatch.setattr(sweep_module, "run_on_ray", lambda *_, **__: {})
    monkeypatch.setattr(sweep_module, "_compare", lambda *_: made)
    (tmp_path / "sweep").mkdir()
    run_sweep(path)
    warned = [line for line in capsys.readouterr().out.splitlines() if "not compared" in line]
    assert len(warned) == 1
    assert warned[0].startswith(
        "warning: top-2 and ensemble are not compared in sweep.json: they were evaluated on 4 and 3 utt"
    )
    (recorded,) = load_records(tmp_path / "sweep" / "sweep.json")
    assert {(each.arm, each.against) for each in recorded.differences} == {("top-2", "hard")}


def test_failed_runs_are_named_where_the_others_cannot_be_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_sweep(tmp_path, "sweep", seeds=[0])
    failures = {str(tmp_path / "sweep" / "runs" / "hard-0"): "the store is gone"}
    monkeypatch.setattr(sweep_module, "check_evaluation", lambda _: None)
    monkeypatch.setattr(sweep_module, "run_on_ray", lambda *_, **__: failures)
    # The ensemble's labels are gone too.
    message = r"1 of 2 runs failed.*\n  hard-0: the store is gone .*\n.*cannot be compared: .*not a published dataset"
    with pytest.raises(CheckFailedError, match=message):
        run_sweep(path)


def test_a_pair_without_results_is_named(tmp_path: Path) -> None:
    """As of an arm whose runs all failed."""
    sweep = replace(sweep_of(tmp_path, None), pairs=(("soft", "hard"), ("soft", "failed")))
    assert not_compared(comparison(tmp_path), sweep) == [
        "soft and failed are not compared in sweep.json: there are no results of failed"
    ]


def test_of_a_gain_that_may_be_none_shares_have_no_interval(tmp_path: Path) -> None:
    found = sweep_records(comparison(tmp_path), sweep_of(tmp_path, ("hard", "by-chance")))
    assert all((gain.low, gain.high) == (None, None) for gain in found.gains)
    # By 5 of 500 frames; the other two by 55 and 27.5.
    assert [gain.kept for gain in found.gains] == pytest.approx([1100.0, 550.0])


def test_a_gain_whose_pair_is_not_tested_otherwise_is_tested(tmp_path: Path) -> None:
    found = sweep_records(comparison(tmp_path), sweep_of(tmp_path, ("soft", "half")))
    assert ("half", "soft", pytest.approx(5.5)) in [(e.arm, e.against, e.difference) for e in found.differences]
    assert [gain.arm for gain in found.gains] == ["hard", "by-chance"]


def test_a_gain_of_an_arm_that_failed_is_passed_over(tmp_path: Path) -> None:
    found = sweep_records(comparison(tmp_path), sweep_of(tmp_path, ("hard", "failed")))
    assert found.gains == ()
    # As in files from before there were gains.
    assert '"gains"' not in records_json([found])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist; student-trainer sweep makes it"),
        ("{", "is not JSON"),
        ({"version": 2, "sweeps": []}, "version"),
        ({"version": 1, "sweeps": [], "more": 1}, "unknown key 'more'"),
        ({"version": 1, "sweeps": [NAMELESS]}, "no records of essence, hard, which are among its differences or gains"),
    ],
)
def test_files_that_are_no_records(tmp_path: Path, content: Any, message: str) -> None:
    if content is not None:
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "sweep.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        load_records(tmp_path / "sweep.json")
