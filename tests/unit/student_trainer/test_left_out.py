"""Utterances that a dataset skipped: left out with an account, and nothing else is."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from softlabel_schemas import InputError, Utterance
from student_trainer.cli import main
from student_trainer.compare import compare, text
from student_trainer.config import TrainConfig
from student_trainer.evaluate import evaluate_dataset, evaluate_run
from student_trainer.report import render
from student_trainer.run_folder import RunFolder
from student_trainer.train import train
from tests.support.speech import (
    INVENTORY,
    Speech,
    save_corpus,
    train_config,
    write_soft_labels,
    write_speech,
)

SKIPPED = {"train-03": "its audio is empty", "train-07": "its posteriors are not finite"}
ONE_EPOCH = {"training__epochs": 1}


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Speech:
    return write_speech(tmp_path_factory.mktemp("left-out") / "speech")


@pytest.fixture
def new_config(speech: Speech, tmp_path: Path) -> Callable[..., TrainConfig]:
    """A run on labels of the train split that lack ``skipped``."""

    def make(name: str, corpus: Speech = speech, skipped: dict[str, str] = SKIPPED, **changes: Any) -> TrainConfig:
        url = tmp_path / f"labels-{name}"
        write_soft_labels(url, speech.split("train"), skipped=skipped)
        return train_config(corpus, tmp_path / name, url=str(url), **ONE_EPOCH, **changes)

    return make


def run_json(config: TrainConfig) -> dict[str, Any]:
    return json.loads((Path(config.output) / "run.json").read_bytes())


def model_bytes(config: TrainConfig) -> bytes:
    return (Path(config.output) / "model.safetensors").read_bytes()


def without(utterances: Sequence[Utterance], ids: Sequence[str]) -> list[Utterance]:
    return [utterance for utterance in utterances if utterance.utterance_id not in ids]


class TestTraining:
    def test_is_that_of_a_corpus_without_them(
        self, speech: Speech, new_config: Callable[..., TrainConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config = new_config("run")
        assert train(config)
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
        assert config.soft_labels is not None
        assert line == (
            f"left out 2 of 20 utterances (10%), for which {config.soft_labels.url} has no labels: "
            "train-03: its audio is empty; train-07: its posteriors are not finite "
            f"(all of them: {config.output}/run.json, left_out)"
        )
        assert run_json(config)["left_out"] == [
            {"utterance_id": utterance_id, "reason": reason} for utterance_id, reason in SKIPPED.items()
        ]
        assert run_json(config)["corpus_digest"] == speech.corpus.select_splits(["train"]).digest
        fewer = save_corpus(tmp_path, without(speech.located(), list(SKIPPED)))
        expected = train_config(fewer, tmp_path / "expected", url=config.soft_labels.url, **ONE_EPOCH)
        assert train(expected)
        assert run_json(expected)["left_out"] == []
        assert "left out" not in capsys.readouterr().err
        assert model_bytes(config) == model_bytes(expected)

    def test_a_resumed_run_leaves_out_the_same(self, new_config: Callable[..., TrainConfig]) -> None:
        config = new_config("run")
        assert train(config)
        before = (run_json(config), model_bytes(config))
        assert not train(config)
        assert (run_json(config), model_bytes(config)) == before

    def test_only_of_the_splits_that_are_trained_on(
        self, speech: Speech, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Skipped utterances of the dev split are evaluated: that needs no soft labels."""
        dev = speech.split("dev")[0].utterance_id
        write_soft_labels(tmp_path / "labels", speech.utterances, skipped={dev: "broken"})
        config = train_config(speech, tmp_path / "run", url=str(tmp_path / "labels"), **ONE_EPOCH)
        assert train(config)
        assert run_json(config)["left_out"] == []
        assert "left out" not in capsys.readouterr().err

    @pytest.mark.parametrize("damage", ["class", "length", "audio"])
    def test_what_made_them_unusable_does_no_harm(
        self, speech: Speech, new_config: Callable[..., TrainConfig], tmp_path: Path, damage: str
    ) -> None:
        """A hard-only run on the same corpus is refused as ever."""
        utterances = speech.located()
        bad = utterances[3]
        assert bad.hard_labels is not None
        utterances[3] = {
            "class": replace(bad, hard_labels=np.full_like(bad.hard_labels, INVENTORY.num_classes)),
            "length": replace(bad, hard_labels=bad.hard_labels[:-1]),
            "audio": replace(bad, audio="missing.wav"),
        }[damage]
        corpus = save_corpus(tmp_path, utterances)
        assert train(new_config("run", corpus))
        with pytest.raises(InputError, match=r"hard labels run from|frames|does not exist"):
            train(train_config(corpus, tmp_path / "hard", **ONE_EPOCH))

    def test_one_that_is_missing_for_another_reason(
        self, speech: Speech, new_config: Callable[..., TrainConfig], tmp_path: Path
    ) -> None:
        more = [replace(speech.located("train")[0], utterance_id="train-99"), *speech.located()]
        with pytest.raises(InputError, match="no soft targets for utterance train-99: no such utterance"):
            train(new_config("run", save_corpus(tmp_path, more)))

    def test_nothing_left(self, speech: Speech, new_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
        few = save_corpus(tmp_path, [u for u in speech.located() if u.utterance_id in SKIPPED or u.split == "dev"])
        with pytest.raises(
            InputError, match="no labels for any of 2 utterances, all were skipped: train-03: its audio"
        ):
            train(new_config("run", few))

    def test_the_line_stays_one_line(
        self, new_config: Callable[..., TrainConfig], capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Whoever made the dataset wrote the reasons."""
        reasons = {f"train-{index:02d}": "\x1b[2J\nerror: " + "x" * 1000 for index in range(5)}
        config = new_config("run", skipped=reasons)
        assert train(config)
        errors = capsys.readouterr().err
        assert "\x1b" not in errors
        (line,) = [line for line in errors.splitlines() if "left out" in line]
        assert len(line) < 800
        assert "left out 5 of 20 utterances (25%)" in line
        assert "; ... (all of them: " in line
        assert [entry["reason"] for entry in run_json(config)["left_out"]] == list(reasons.values())


class TestEvaluation:
    def test_of_the_ensemble(self, speech: Speech, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        test = speech.split("test")
        bad = test[1].utterance_id
        labels = write_soft_labels(tmp_path / "labels", test, skipped={bad: "broken"})
        output = tmp_path / "ensemble.json"
        result = evaluate_dataset(labels.url, speech.manifest, ["test"], str(output))
        assert f"left out 1 of 3 utterances (33%), for which {labels.url} has no labels: {bad}: broken" in (
            capsys.readouterr().err
        )
        assert json.loads(output.read_bytes()) == result
        assert result["left_out"] == [{"utterance_id": bad, "reason": "broken"}]
        assert [u["utterance_id"] for u in result["utterances"]] == [test[0].utterance_id, test[2].utterance_id]
        assert result["corpus_digest"] == speech.corpus.select_splits(["test"]).digest
        fewer = save_corpus(tmp_path, without(speech.located("test"), [bad]))
        expected = evaluate_dataset(labels.url, fewer.manifest, ["test"], str(tmp_path / "fewer.json"))
        for name in ("num_frames", "frame_error_rate", "phone_error_rate", "cross_entropy", "calibration_error"):
            assert result[name] == expected[name]
        assert expected["left_out"] == []


class TestComparison:
    @pytest.fixture
    def runs(self, speech: Speech, new_config: Callable[..., TrainConfig], tmp_path: Path) -> list[str]:
        """One hard-only, one with soft labels for 18 of 20 utterances; both evaluated on the test split."""
        soft = new_config("soft").model_copy(update={"name": "soft"})
        hard = train_config(speech, tmp_path / "hard", **ONE_EPOCH).model_copy(update={"name": "hard"})
        for config in (hard, soft):
            assert train(config)
            evaluate_run(config.output, speech.manifest, ["test"], None)
        return [hard.output, soft.output]

    def test_says_what_an_arm_was_trained_without(self, runs: list[str]) -> None:
        comparison = compare(runs, [], [], ["test"])
        line = "soft and hard were not trained alike: utterances_left_out: 2 against 0"
        assert f"warning: {line}" in text(comparison).splitlines()
        assert line in render(comparison)

    def test_the_ensemble_without_some(self, speech: Speech, runs: list[str], tmp_path: Path) -> None:
        bad = speech.split("test")[1].utterance_id
        write_soft_labels(tmp_path / "labels-test", speech.split("test"), skipped={bad: "broken"})
        ensemble = str(tmp_path / "ensemble.json")
        evaluate_dataset(str(tmp_path / "labels-test"), speech.manifest, ["test"], ensemble)
        comparison = compare(runs, [ensemble], [], ["test"])
        line = "ensemble was evaluated without 1 of 3 utterances, which were never labelled"
        assert f"warning: {line}" in text(comparison).splitlines()
        assert line in render(comparison)
        # Without the account of it, it is an evaluation of something else.
        found = json.loads(Path(ensemble).read_bytes())
        RunFolder(tmp_path).write_json("ensemble.json", {**found, "left_out": []})
        with pytest.raises(InputError, match=rf"3 and 2 utterances, not the same ones .*\(utterance {bad}\)"):
            compare(runs, [ensemble], [], ["test"])


def test_the_command_says_so(new_config: Callable[..., TrainConfig], speech: Speech, tmp_path: Path) -> None:
    bad = speech.split("test")[0].utterance_id
    write_soft_labels(tmp_path / "labels-test", speech.split("test"), skipped={bad: "broken"})
    output = str(tmp_path / "ensemble.json")
    args = ["--dataset", str(tmp_path / "labels-test"), "--corpus", speech.manifest, "--split", "test"]
    result: Result = CliRunner().invoke(main, ["evaluate", *args, "--output", output])
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("left out 1 of 3 utterances (33%)")
    assert f"(all of them: {output}, left_out)" in result.stderr
