"""Speech with and without hard labels in one run: what is used, what is refused, and what each frame adds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from softlabel_schemas import InputError, Utterance
from student_trainer import train as train_module
from student_trainer.arms import load_arms
from student_trainer.config import TrainConfig
from student_trainer.evaluate import evaluate_run
from student_trainer.hard_labels import only_hard_labels_of
from student_trainer.loss import SparseTargets, hard_and_soft_loss
from student_trainer.run_folder import RUN, RunFolder
from student_trainer.train import train
from tests.support.disturbed import train_until_the_store_fails
from tests.support.speech import (
    Speech,
    save_corpus,
    train_config,
    without_labels,
    write_soft_labels,
    write_speech,
)
from tests.support.trainings import checkpoint, history

BOTH = {"corpus__train_splits": ["train", "more"], "corpus__hard_label_splits": ["train"]}


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Speech:
    """Of the 20 training utterances, 12 are moved to the split "more"; they keep their hard labels."""
    plain = write_speech(tmp_path_factory.mktemp("hard-labels") / "speech")
    return save_corpus(
        plain.folder,
        [replace(u, split="more") if u.split == "train" and i >= 8 else u for i, u in enumerate(plain.utterances)],
    )


@pytest.fixture(scope="module")
def url(speech: Speech) -> str:
    return write_soft_labels(speech.folder / "labels", speech.split("train") + speech.split("more")).url


def weights(config: TrainConfig) -> bytes:
    return (Path(config.output) / "model.safetensors").read_bytes()


class TestOnlyHardLabelsOf:
    def test_the_labels_of_other_splits_are_gone(self, speech: Speech) -> None:
        found = only_hard_labels_of(speech.corpus, ["train", "test"])
        assert found.table.schema == speech.corpus.table.schema
        for utterance, expected in zip(found, speech.corpus, strict=True):
            if expected.split in ("train", "test"):
                np.testing.assert_array_equal(utterance.hard_labels, expected.hard_labels)
            else:
                assert utterance.hard_labels is None
            assert replace(utterance, hard_labels=None) == replace(expected, hard_labels=None)

    def test_of_row_groups_with_more_labels_than_one_array_holds(self, speech: Speech) -> None:
        """2^30 labels in each of three; their memory is never touched."""
        zeros = pa.Array.from_buffers(pa.int32(), 1 << 30, [None, pa.py_buffer(np.zeros(1 << 30, dtype=np.int32))])
        labels = pa.chunked_array([pa.ListArray.from_arrays(pa.array([0, 1 << 30], pa.int32()), zeros)] * 3)
        table = speech.corpus.table.slice(0, 3)
        column = table.schema.get_field_index("hard_labels")
        large = speech.corpus.with_table(table.set_column(column, "hard_labels", labels))
        found = only_hard_labels_of(large, ["none"]).table["hard_labels"]
        assert (len(found), found.null_count) == (3, 3)


class TestMixedRun:
    def test_hard_labels_that_are_not_used_change_nothing(self, speech: Speech, url: str, tmp_path: Path) -> None:
        """The same weights as with a manifest that has no labels there, or others; with all labels used, other weights."""
        changed = {
            "absent": [without_labels(u) if u.split == "more" else u for u in speech.located()],
            "others": [
                replace(u, hard_labels=u.hard_labels[::-1].copy()) if u.split == "more" else u for u in speech.located()
            ],
        }
        runs = [train_config(speech, tmp_path / "run", url=url, training__epochs=1, **BOTH)]
        for name, utterances in changed.items():
            (tmp_path / name).mkdir()
            corpus = save_corpus(tmp_path / name, utterances)
            runs.append(train_config(corpus, tmp_path / f"run-{name}", url=url, training__epochs=1, **BOTH))
        everything = BOTH | {"corpus__hard_label_splits": None}
        runs.append(train_config(speech, tmp_path / "everything", url=url, training__epochs=1, **everything))
        assert all(train(config) for config in runs)
        first, *same, other = map(weights, runs)
        assert set(same) == {first}
        assert other != first

    @pytest.mark.parametrize("num_heads", [1, 2])
    def test_what_each_frame_adds(
        self, speech: Speech, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_heads: int
    ) -> None:
        """In the loop itself, batches with no labelled frame among them."""
        labelled_counts = []

        def checked(hard_NV: torch.Tensor, soft_NV: torch.Tensor, targets: SparseTargets, **options: Any) -> Any:
            losses = hard_and_soft_loss(hard_NV, soft_NV, targets, **options)
            (hard_gradient_NV,) = torch.autograd.grad(losses[0], hard_NV, retain_graph=True)
            again = soft_NV.detach().requires_grad_()
            (soft_gradient_NV,) = torch.autograd.grad(hard_and_soft_loss(again, again, targets, **options)[1], again)
            is_labelled_N = options["labels_N"] >= 0
            labelled_counts.append(int(is_labelled_N.sum()))
            assert not hard_gradient_NV[~is_labelled_N].any()
            assert hard_gradient_NV[is_labelled_N].abs().sum(dim=1).all()
            assert soft_gradient_NV.abs().sum(dim=1).all()
            assert float(losses[0].detach()) > 0 or not is_labelled_N.any()
            return losses

        monkeypatch.setattr(train_module, "hard_and_soft_loss", checked)
        config = train_config(
            speech,
            tmp_path / "run",
            url=url,
            soft_labels__num_heads=num_heads,
            training__epochs=1,
            training__batch_seconds=0.9,
            **BOTH,
        )
        assert train(config)
        assert min(labelled_counts) == 0
        assert max(labelled_counts) > 0

    def test_the_hard_loss_is_that_of_steps_with_hard_labels(
        self, speech: Speech, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of a batch without any it says nothing, and is not 0."""
        losses = []

        def recording(*arguments: Any, **options: Any) -> Any:
            hard, soft = hard_and_soft_loss(*arguments, **options)
            if (options["labels_N"] >= 0).any():
                losses.append(float(hard.detach()))
            return hard, soft

        monkeypatch.setattr(train_module, "hard_and_soft_loss", recording)
        settings = {"training__epochs": 1, "training__batch_seconds": 0.9, **BOTH}
        config = train_config(speech, tmp_path / "run", url=url, **settings)
        assert train(config)
        (record,) = history(config)
        assert 0 < len(losses) < record["steps"]
        assert record["hard_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-12)

    def test_resumes_to_the_same_weights(
        self, speech: Speech, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """From a checkpoint within an epoch."""
        settings = {"training__epochs": 2, "training__checkpoint_minutes": 1e-9, **BOTH}
        whole, stopped = (train_config(speech, tmp_path / name, url=url, **settings) for name in ("whole", "stopped"))
        assert train(whole)
        train_until_the_store_fails(stopped, monkeypatch)
        state = checkpoint(stopped)
        assert state["progress"]["step"] > 0
        assert train(stopped)
        assert weights(stopped) == weights(whole)
        assert history(stopped) == history(whole)


class TestOtherLabels:
    """The same speech under the same settings, of which other utterances' hard labels are in use: no other digest is over
    that."""

    @pytest.fixture
    def runs(self, speech: Speech, url: str, tmp_path: Path) -> tuple[TrainConfig, TrainConfig]:
        """Two seeds, one epoch each. The first was trained with the labels of one half of the speech, the second with those
        of the other, which the manifest now has."""
        runs = []
        for seed in (0, 1):
            rows = [replace(u, split=halved(u, seed)) for u in speech.located()]
            here = save_corpus(tmp_path, rows)
            run = train_config(here, tmp_path / f"run-{seed}", url=url, seed=seed, training__epochs=1, **BOTH)
            assert train(run)
            evaluate_run(run.output, here.manifest, ["test"], None)
            runs.append(run)
        return runs[0], runs[1]

    def test_they_are_another_run_and_no_seed_of_one_arm(self, runs: tuple[TrainConfig, TrainConfig]) -> None:
        first, second = runs
        assert first.model_copy(update={"seed": 1}).result_settings() == second.result_settings()
        with pytest.raises(InputError, match="a run with another hard_labels_digest"):
            train(first)
        assert not train(second)
        with pytest.raises(InputError, match=r"are not seeds of one arm: hard_labels_digest: \w{64} against \w{64};"):
            load_arms([first.output, second.output], [], ["test"])

    def test_without_a_choice_of_splits_there_is_no_digest(self, speech: Speech, tmp_path: Path) -> None:
        run = train_config(speech, tmp_path / "run", training__epochs=1)
        assert train(run)
        assert "hard_labels_digest" not in RunFolder(run.output).read_json(RUN)


def halved(utterance: Utterance, odd: int) -> str:
    """Every other training utterance in "train", the rest in "more"."""
    if utterance.split not in ("train", "more"):
        return utterance.split
    return "train" if int(utterance.utterance_id[-2:]) % 2 == odd else "more"


class TestRefusals:
    def test_neither_kind_of_label(self, speech: Speech, tmp_path: Path) -> None:
        config = train_config(speech, tmp_path / "run", **BOTH)
        message = r"corpus\.parquet: 12 of 20 training utterances have no hard labels in use \(train-08 is the first\)"
        with pytest.raises(InputError, match=message):
            train(config)
        assert not (tmp_path / "run").exists()

    def test_a_head_that_would_stay_untrained(self, speech: Speech, url: str, tmp_path: Path) -> None:
        here = save_corpus(tmp_path, [without_labels(u) if u.split == "train" else u for u in speech.located()])
        heads: dict[str, Any] = {"soft_labels__num_heads": 2}
        with pytest.raises(InputError, match=r"no training utterance .* in \[soft_labels\] use num_heads = 1$"):
            train(train_config(here, tmp_path / "run", url=url, **heads))
        # Of one head there is none to choose: to do the one alone would be refused, too.
        heads["soft_labels__decoding_head"] = "soft"
        with pytest.raises(InputError, match=r"use num_heads = 1 and leave decoding_head out$"):
            train(train_config(here, tmp_path / "run", url=url, **heads))

    def test_a_split_that_no_row_has(self, speech: Speech, url: str, tmp_path: Path) -> None:
        splits = {"corpus__train_splits": ["train", "none"], "corpus__hard_label_splits": ["none"]}
        with pytest.raises(InputError, match="the corpus has no split none; it has dev, more, test, train"):
            train(train_config(speech, tmp_path / "run", url=url, **splits))
