"""Speech with and without hard labels in one run: what is used, what is refused, and what each frame adds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from softlabel_schemas import InputError
from student_trainer import train as train_module
from student_trainer.config import TrainConfig
from student_trainer.hard_labels import only_hard_labels_of
from student_trainer.loss import SparseTargets, hard_and_soft_loss
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

    def test_resumes_to_the_same_weights(
        self, speech: Speech, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """From a checkpoint within an epoch."""
        settings = {"training__epochs": 2, "training__checkpoint_minutes": 1e-9, **BOTH}
        whole, stopped = (train_config(speech, tmp_path / name, url=url, **settings) for name in ("whole", "stopped"))
        assert train(whole)
        train_until_the_store_fails(stopped, monkeypatch)
        assert train(stopped)
        assert weights(stopped) == weights(whole)


class TestRefusals:
    def test_neither_kind_of_label(self, speech: Speech, tmp_path: Path) -> None:
        config = train_config(speech, tmp_path / "run", **BOTH)
        message = r"corpus\.parquet: 12 of 20 training utterances have no hard labels in use \(train-08 is the first\)"
        with pytest.raises(InputError, match=message):
            train(config)
        assert not (tmp_path / "run").exists()

    def test_a_head_that_would_stay_untrained(self, speech: Speech, url: str, tmp_path: Path) -> None:
        here = save_corpus(tmp_path, [without_labels(u) if u.split == "train" else u for u in speech.located()])
        config = train_config(here, tmp_path / "run", url=url, soft_labels__num_heads=2)
        with pytest.raises(InputError, match="no training utterance has hard labels in use"):
            train(config)

    def test_a_split_that_no_row_has(self, speech: Speech, url: str, tmp_path: Path) -> None:
        splits = {"corpus__train_splits": ["train", "none"], "corpus__hard_label_splits": ["none"]}
        with pytest.raises(InputError, match="the corpus has no split none; it has dev, more, test, train"):
            train(train_config(speech, tmp_path / "run", url=url, **splits))
