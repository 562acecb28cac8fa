"""Evaluation of a run and of the ensemble behind a dataset, against metrics computed from whole posteriors."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from click.testing import CliRunner, Result

from softlabel_schemas import InputError, Utterance, write_corpus
from softlabel_schemas.corpus import Corpus
from softlabel_schemas.frame_selection import FrameSelection
from softlabel_schemas.inventory import ClassInventory
from softlabel_schemas.selection import HeadAndSample, RandomSampling, TopK
from softlabel_schemas.utterance_reader import UtteranceReader
from student_trainer.cli import main
from student_trainer.evaluate import evaluate_dataset, evaluate_run
from student_trainer.metrics import NUM_BINS, Metrics
from student_trainer.run_folder import RUN, RunFolder, build_model
from tests.support.speech import (
    FRAME_SHIFT_MS,
    FRONT_END,
    INVENTORY,
    Speech,
    save_corpus,
    train_config,
    without_labels,
    write_soft_labels,
    write_speech,
)

LogPosteriors = dict[str, npt.NDArray[np.float64]]


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Speech:
    return write_speech(tmp_path_factory.mktemp("evaluate") / "speech")


@pytest.fixture(scope="module")
def run(speech: Speech) -> Path:
    """A run of a model that was never trained."""
    folder = RunFolder(speech.folder / "run")
    config = train_config(speech, folder.path)
    torch.manual_seed(0)
    folder.write_json(RUN, {"config": config.model_dump(mode="json"), "history": []})
    folder.write_inventory(INVENTORY)
    model = build_model(config, INVENTORY)
    with torch.no_grad():
        # Far from uniform, so that the bins of the calibration error fill.
        model.heads[0].weight *= 8
    folder.write_model(model)
    return folder.path


def dense_metrics(utterances: Sequence[Utterance], log_posteriors: LogPosteriors) -> dict[str, float]:
    """The definitions, frame by frame. Phones are told apart by ``Metrics``, whose tests are its own."""
    frames: list[tuple[bool, float, float]] = []
    for utterance in utterances:
        log_posterior_TV = log_posteriors[utterance.utterance_id]
        assert utterance.hard_labels is not None
        assert len(log_posterior_TV) == len(utterance.hard_labels)
        for label, log_probs in zip(utterance.hard_labels.tolist(), log_posterior_TV.tolist(), strict=True):
            if label >= 0:
                best = max(range(len(log_probs)), key=log_probs.__getitem__)
                frames.append((best == label, math.exp(log_probs[best]), log_probs[label]))
    ece = 0.0
    for index in range(NUM_BINS):
        in_bin = [frame for frame in frames if index == min(int(frame[1] * NUM_BINS), NUM_BINS - 1)]
        ece += abs(sum(right for right, _, _ in in_bin) - sum(confidence for _, confidence, _ in in_bin))
    return {
        "num_frames": len(frames),
        "frame_error_rate": 100 * sum(not right for right, _, _ in frames) / len(frames),
        "cross_entropy": -sum(log_prob for _, _, log_prob in frames) / len(frames),
        "calibration_error": 100 * ece / len(frames),
    }


def model_log_posteriors(run: Path, corpus: Corpus) -> LogPosteriors:
    """One utterance at a time."""
    model, config, _ = RunFolder(run).load_model()
    found = {}
    for utterance in corpus:
        (features_TD,) = UtteranceReader(corpus).features(utterance, [config.front_end])
        with torch.no_grad():
            logits_BTV, _ = model(torch.from_numpy(features_TD)[None], torch.tensor([len(features_TD)]))
        found[utterance.utterance_id] = logits_BTV[0].double().log_softmax(dim=-1).numpy()
    return found


def assert_metrics(result: dict[str, Any], expected: dict[str, float]) -> None:
    assert {name: result[name] for name in expected} == pytest.approx(expected, abs=1e-4)


class TestRun:
    def test_equals_the_definitions(self, speech: Speech, run: Path) -> None:
        result = evaluate_run(run, speech.manifest, ["test", "dev"], None)
        utterances = [*speech.split("dev"), *speech.split("test")]
        log_posteriors = model_log_posteriors(run, speech.corpus)
        expected = dense_metrics(utterances, log_posteriors)
        assert 10 < expected["frame_error_rate"] < 100
        assert_metrics(result, expected)
        metrics = Metrics(INVENTORY)
        errors = phones = 0
        for utterance in utterances:
            labelled = utterance.hard_labels >= 0
            top1 = log_posteriors[utterance.utterance_id].argmax(axis=1)
            reference = metrics.phone_sequence(utterance.hard_labels[labelled])
            errors += edit_distance(reference, metrics.phone_sequence(top1[labelled]))
            phones += len(reference)
        assert result["phone_error_rate"] == pytest.approx(100 * errors / phones)

    def test_what_is_written(self, speech: Speech, run: Path, tmp_path: Path) -> None:
        result = evaluate_run(run, speech.manifest, ["test"], None)
        stored = (run / "evaluation-test.json").read_bytes()
        assert json.loads(stored) == result
        assert (result["kind"], result["name"], result["splits"]) == ("student", "student", ["test"])
        assert result["inventory_digest"] == INVENTORY.digest()
        assert result["corpus_digest"] == speech.corpus.select_splits(["test"]).digest
        ids = [record["utterance_id"] for record in result["utterances"]]
        assert ids == sorted(utterance.utterance_id for utterance in speech.split("test"))
        assert sum(record["frames"] for record in result["utterances"]) == result["num_frames"]
        evaluate_run(run, speech.manifest, ["test"], str(tmp_path / "other.json"))
        assert (tmp_path / "other.json").read_bytes() == stored

    def test_another_number_of_frames(self, speech: Speech, run: Path, tmp_path: Path) -> None:
        utterances = speech.located("test")
        utterances[1] = replace(utterances[1], hard_labels=utterances[1].hard_labels[:-3])
        num_labels = len(utterances[1].hard_labels)
        other = save_corpus(tmp_path, utterances)
        message = (
            f"{utterances[1].utterance_id}: the model gives {num_labels + 3} frames, there are {num_labels} labels"
        )
        with pytest.raises(InputError, match=message):
            evaluate_run(run, other.manifest, ["test"], None)

    def test_utterances_without_hard_labels(self, speech: Speech, run: Path, tmp_path: Path) -> None:
        utterances = speech.split("test")
        other = save_corpus(tmp_path, [without_labels(utterances[0]), *utterances[1:]])
        with pytest.raises(InputError, match=r"1 utterances of \['test'\] have no hard labels"):
            evaluate_run(run, other.manifest, ["test"], None)

    def test_speech_without_any_label(self, speech: Speech, run: Path, tmp_path: Path) -> None:
        """It would have no errors: the utterances have hard labels, but all are -1. Of one labelled frame it has."""
        utterances = [replace(u, hard_labels=np.full_like(u.hard_labels, -1)) for u in speech.located("test")]
        other = save_corpus(tmp_path, utterances)
        with pytest.raises(InputError, match=r"no frame of \['test'\] has a hard label \(all are -1\)"):
            evaluate_run(run, other.manifest, ["test"], None)
        utterances[1].hard_labels[3] = 0
        result = evaluate_run(run, save_corpus(tmp_path, utterances).manifest, ["test"], str(tmp_path / "x.json"))
        assert result["num_frames"] == 1

    def test_a_corpus_of_another_inventory(self, speech: Speech, run: Path) -> None:
        renamed = ClassInventory(names=tuple("uvwxyz"))
        (run / "inventory.json").write_bytes(renamed.to_json())
        try:
            with pytest.raises(InputError, match=f"{INVENTORY.digest()[:12]}.*{renamed.digest()[:12]}"):
                evaluate_run(run, speech.manifest, ["test"], None)
        finally:
            RunFolder(run).write_inventory(INVENTORY)


def edit_distance(reference: list[int], found: list[int]) -> int:
    row = list(range(len(found) + 1))
    for deletions, wanted in enumerate(reference, start=1):
        diagonal, row[0] = row[0], deletions
        for column, other in enumerate(found, start=1):
            diagonal, row[column] = row[column], min(row[column] + 1, row[column - 1] + 1, diagonal + (wanted != other))
    return row[-1]


class TestDataset:
    def test_equals_the_definitions(self, speech: Speech, tmp_path: Path) -> None:
        """With every hard label kept, the stored part of a posterior says all that the metrics need."""
        labels = write_soft_labels(tmp_path / "labels", [*speech.split("test"), *speech.split("train")])
        result = evaluate_dataset(labels.url, speech.manifest, ["train"], str(tmp_path / "ensemble.json"))
        log_posteriors = {name: values.astype(np.float64) for name, values in labels.log_posteriors.items()}
        assert_metrics(result, dense_metrics(speech.split("train"), log_posteriors))
        assert (result["kind"], result["num_utterances"]) == ("ensemble", 20)
        assert json.loads((tmp_path / "ensemble.json").read_bytes()) == result

    def test_a_label_that_was_not_kept_makes_the_cross_entropy_unknown(self, speech: Speech, tmp_path: Path) -> None:
        labels = write_soft_labels(tmp_path / "labels", speech.split("test"), selection=TopK(k=1))
        result = evaluate_dataset(labels.url, speech.manifest, ["test"], str(tmp_path / "ensemble.json"))
        expected = dense_metrics(
            speech.split("test"), {name: values.astype(np.float64) for name, values in labels.log_posteriors.items()}
        )
        assert expected["frame_error_rate"] > 0
        del expected["cross_entropy"]
        assert_metrics(result, expected)
        assert result["cross_entropy"] is None
        # JSON proper: no NaN.
        stored = json.loads((tmp_path / "ensemble.json").read_bytes(), parse_constant=pytest.fail)
        assert stored == result

    def test_a_folder_is_no_output(self, speech: Speech, run: Path) -> None:
        """Before the work, of a run too."""
        url = str(speech.folder / "labels")
        for evaluate in (evaluate_run, evaluate_dataset):
            with pytest.raises(InputError, match=f"^{run} is a folder; give the name of a JSON file$"):
                evaluate(str(run) if evaluate is evaluate_run else url, speech.manifest, ["test"], str(run))

    def test_labels_without_some_frames(self, speech: Speech, tmp_path: Path) -> None:
        """They would count as errors."""
        frames = FrameSelection(silence=0, uncertain=0)
        url = write_soft_labels(tmp_path / "labels", speech.split("test"), selection=TopK(k=3, frames=frames)).url
        message = (
            r"labels was labelled without some frames \(selection\.frames drops uncertain, silence\), .*; evaluate a"
        )
        for units in (None, "words"):
            with pytest.raises(InputError, match=message):
                evaluate_dataset(url, speech.manifest, ["test"], str(tmp_path / "x.json"), units=units)
        assert not (tmp_path / "x.json").exists()

    def test_labels_that_are_a_sample(self, speech: Speech, tmp_path: Path) -> None:
        """Their likeliest class is the one drawn most often."""
        for selection in (RandomSampling(draws=3), HeadAndSample(k=1, draws=2)):
            url = tmp_path / selection.policy
            write_soft_labels(url, speech.split("test"), selection=selection, spec={"temperatures": (1.0,)})
            message = f'holds a sample of each posterior .*"{selection.policy}".*; evaluate labels of the same speech'
            with pytest.raises(InputError, match=message):
                evaluate_dataset(str(url), speech.manifest, ["test"], str(tmp_path / "x.json"))
        assert not (tmp_path / "x.json").exists()

    def test_refusals(self, speech: Speech, tmp_path: Path) -> None:
        test = speech.split("test")
        num_frames = len(test[2].hard_labels)
        url = write_soft_labels(
            tmp_path / "labels", test, skipped={test[0].utterance_id: "broken"}, extra_frames={test[2].utterance_id: 1}
        ).url
        other = save_corpus(tmp_path, [replace(u, split=f"test-{index}") for index, u in enumerate(test)])
        with pytest.raises(
            InputError, match=f"for any of 1 utterances, all were skipped: {test[0].utterance_id}: broken"
        ):
            evaluate_dataset(url, other.manifest, ["test-0"], str(tmp_path / "x.json"))
        with pytest.raises(InputError, match=f"{num_frames + 1} frames of soft targets, {num_frames} of hard labels"):
            evaluate_dataset(url, other.manifest, ["test-2"], str(tmp_path / "x.json"))
        with pytest.raises(InputError, match="no split eval; it has test-0, test-1, test-2"):
            evaluate_dataset(url, other.manifest, ["eval"], str(tmp_path / "x.json"))
        assert not (tmp_path / "x.json").exists()


class TestCommand:
    def evaluate(self, speech: Speech, *args: str) -> Result:
        return CliRunner().invoke(main, ["evaluate", "--corpus", speech.manifest, "--split", "test", *args])

    def test_prints_four_lines(self, speech: Speech, run: Path) -> None:
        result = self.evaluate(speech, str(run))
        assert result.exit_code == 0, result.output
        stored = json.loads((run / "evaluation-test.json").read_bytes())
        names = ("frame_error_rate", "phone_error_rate", "cross_entropy", "calibration_error")
        assert result.stdout == "".join(f"{name:<18} {stored[name]:.3f}\n" for name in names)

    def test_of_a_dataset(self, speech: Speech, tmp_path: Path) -> None:
        url = write_soft_labels(tmp_path / "labels", speech.split("test"), selection=TopK(k=1)).url
        result = self.evaluate(speech, "--dataset", url, "--output", str(tmp_path / "ensemble.json"))
        assert result.exit_code == 0, result.output
        assert "cross_entropy      unknown (not every hard label was kept)" in result.stdout
        assert (tmp_path / "ensemble.json").exists()

    def test_of_classes_without_phones(self, speech: Speech, tmp_path: Path) -> None:
        """There are no phone errors to speak of."""
        inventory = ClassInventory(names=INVENTORY.names)
        utterances = speech.located("test")
        write_corpus(
            tmp_path / "corpus.parquet", utterances, inventory=inventory, hard_label_frame_shift_ms=FRAME_SHIFT_MS
        )
        url = write_soft_labels(tmp_path / "labels", utterances, inventory=inventory).url
        here = replace(speech, manifest=str(tmp_path / "corpus.parquet"))
        result = self.evaluate(here, "--dataset", url, "--output", str(tmp_path / "ensemble.json"))
        assert result.exit_code == 0, result.output
        names = [line.split()[0] for line in result.stdout.splitlines()]
        assert names == ["frame_error_rate", "cross_entropy", "calibration_error"]

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            ([], "give a RUN or --dataset, one of the two"),
            (["{run}", "--dataset", "labels"], "give a RUN or --dataset, one of the two"),
            (["--dataset", "labels"], "--dataset needs --output"),
            (["--dataset", "labels", "--output", "x.json"], "is not a published dataset"),
            (["{run}/missing"], "is not a training run: run.json does not exist"),
        ],
    )
    def test_bad_input_exits_with_2(self, speech: Speech, run: Path, args: list[str], message: str) -> None:
        result = self.evaluate(speech, *[arg.format(run=run) for arg in args])
        assert (result.exit_code, result.stdout) == (2, "")
        assert message in result.stderr
        assert isinstance(result.exception, SystemExit)

    def test_damaged_weights_exit_with_1(self, speech: Speech, run: Path, tmp_path: Path) -> None:
        for name in ("run.json", "inventory.json"):
            (tmp_path / name).write_bytes((run / name).read_bytes())
        result = self.evaluate(speech, str(tmp_path))
        assert result.exit_code == 2
        assert "holds no trained model yet" in result.stderr
        (tmp_path / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes()[:-10])
        result = self.evaluate(speech, str(tmp_path))
        assert result.exit_code == 1
        assert "model.safetensors cannot be read" in result.stderr


def test_front_end_frames_are_the_label_frames(speech: Speech) -> None:
    """What the tests above rest on."""
    for utterance in speech.utterances:
        assert len(utterance.hard_labels) == FRONT_END.num_frames(utterance.num_samples)
