"""What is drawn and what is masked; a run with augmentation, stopped and resumed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from softlabel_schemas import InputError, open_dataset
from softlabel_schemas.front_end import Fbank
from student_trainer import train as train_module
from student_trainer.augmentation import Augmenter
from student_trainer.batch import Batch
from student_trainer.config import Augmentation, SoftLabelConfig, TrainConfig
from student_trainer.data import TrainingData, Variant
from student_trainer.evaluate import model_posteriors
from student_trainer.order import Order
from student_trainer.soft_labels import SoftLabels
from student_trainer.train import train
from tests.support.disturbed import train_until_the_store_fails
from tests.support.speech import (
    FRONT_END,
    INVENTORY,
    Speech,
    save_corpus,
    train_config,
    without_labels,
    write_soft_labels,
    write_speech,
)

ORDER = Order(seed=1, batch_seconds=1.5, pool_seconds=36_000.0)
SMALL_POOLS = Order(seed=1, batch_seconds=1.5, pool_seconds=1.0)
NO_MASKS = {"time_masks": 0, "frequency_masks": 0}
# The eight mel bins of the tests' front end allow no more than a few.
TABLE = {"max_frequency_mask": 2}


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Speech:
    """One training utterance has no hard labels."""
    return write_speech(tmp_path_factory.mktemp("augmentation") / "speech", unlabelled=["train-05"])


@pytest.fixture(scope="module")
def url(speech: Speech) -> str:
    return write_soft_labels(speech.folder / "labels", speech.split("train")).url


def training_data(speech: Speech, url: str, **settings: Any) -> TrainingData:
    corpus = speech.corpus.select_splits(["train"])
    soft_labels = SoftLabels(open_dataset(url), SoftLabelConfig(url=url), corpus, INVENTORY.digest())
    augmenter = Augmenter(Augmentation.model_validate(TABLE | settings), FRONT_END, seed=7)
    return TrainingData(corpus, FRONT_END, [soft_labels], augmenter)


def batches(data: TrainingData, order: Order = ORDER, num_epochs: int = 3, **where: int) -> list[Batch]:
    return [step.batch for step in data.steps(order, temperature=2.0, num_epochs=num_epochs, **where)]


def assert_same(found: Batch, expected: Batch) -> None:
    assert found.utterance_ids == expected.utterance_ids
    assert torch.equal(found.features_BTD, expected.features_BTD)
    assert torch.equal(found.labels_N, expected.labels_N)
    assert found.targets is not None
    assert expected.targets is not None
    assert torch.equal(found.targets.probs_NK, expected.targets.probs_NK)


class TestSpeeds:
    def test_each_utterance_draws_anew_in_every_epoch(self) -> None:
        augmenter = Augmenter(Augmentation(), FRONT_END, seed=3)
        drawn = np.array([augmenter.speeds_N(300, epoch) for epoch in range(10)])
        assert set(drawn.ravel()) == {0.9, 1.0, 1.1}
        for speed in (0.9, 1.0, 1.1):
            assert (drawn == speed).mean() == pytest.approx(1 / 3, abs=0.05)
        np.testing.assert_array_equal(augmenter.speeds_N(300, 4), drawn[4])
        assert (drawn[0] != drawn[1]).mean() > 0.5
        others = Augmenter(Augmentation(), FRONT_END, seed=4)
        assert (others.speeds_N(300, 0) != drawn[0]).mean() > 0.5


class TestMasks:
    @given(
        seed=st.integers(0, 2**32 - 1),
        num_frames=st.integers(1, 40),
        stack=st.integers(1, 4),
        normalize=st.sampled_from(["none", "utterance"]),
    )
    def test_frames_and_bins_have_the_mean_and_the_rest_is_as_it_was(
        self, seed: int, num_frames: int, stack: int, normalize: str
    ) -> None:
        config = Augmentation(time_masks=2, max_time_mask_ms=60.0, frequency_masks=2, max_frequency_mask=3)
        front_end = Fbank(num_mel_bins=8, stack=stack, normalize=normalize)
        features_TD = (5 + np.random.default_rng(seed).standard_normal((num_frames, 8 * stack))).astype(np.float32)
        before = features_TD.copy()
        augmenter = Augmenter(config, front_end, seed)
        masked_TD = augmenter.masked(features_TD, 3, 2)
        np.testing.assert_array_equal(features_TD, before)
        assert masked_TD.shape == features_TD.shape
        # [frames before stacking, mel bins]
        was, found = features_TD.reshape(-1, 8), masked_TD.reshape(-1, 8)
        is_masked = found != was
        np.testing.assert_allclose(found[is_masked], np.broadcast_to(was.mean(axis=0), was.shape)[is_masked], rtol=1e-5)
        frames, bins = is_masked.all(axis=1), is_masked.all(axis=0)
        if len(was) > 1:
            np.testing.assert_array_equal(is_masked, frames[:, None] | bins[None, :])
        assert frames.sum() <= max(2 * min(6, int(0.2 * len(was))), 0) or bins.all()
        np.testing.assert_array_equal(augmenter.masked(features_TD, 3, 2), masked_TD)

    def test_another_utterance_epoch_or_seed_has_other_masks(self) -> None:
        features_TD = np.random.default_rng(0).standard_normal((50, FRONT_END.num_features)).astype(np.float32)
        found = {
            Augmenter(Augmentation(max_frequency_mask=3), FRONT_END, seed).masked(features_TD, row, epoch).tobytes()
            for seed in (0, 1)
            for row in range(4)
            for epoch in range(4)
        }
        assert len(found) == 32

    def test_none_of_either_kind(self) -> None:
        features_TD = np.random.default_rng(0).standard_normal((50, FRONT_END.num_features)).astype(np.float32)
        plain = Augmenter(Augmentation.model_validate(NO_MASKS), FRONT_END, 0)
        np.testing.assert_array_equal(plain.masked(features_TD, 0, 0), features_TD)
        augmenter = Augmenter(Augmentation(time_masks=0, max_frequency_mask=3), FRONT_END, 0)
        found = np.any([augmenter.masked(features_TD, row, 0) != features_TD for row in range(99)], axis=0)
        assert found.all()
        augmenter = Augmenter(Augmentation(frequency_masks=0), FRONT_END, 0)
        for row in range(20):
            changed = (augmenter.masked(features_TD, row, 0) != features_TD).reshape(-1, FRONT_END.num_mel_bins)
            assert (changed.all(axis=1) == changed.any(axis=1)).all()


class TestFeed:
    def test_labels_targets_and_features_have_the_same_frames(self, speech: Speech, url: str) -> None:
        data = training_data(speech, url)
        seconds = dict(zip((u.utterance_id for u in data.corpus), data.seconds_N, strict=True))
        for batch in batches(data):
            assert batch.targets is not None
            assert batch.lengths_B.tolist() == batch.label_lengths_B.tolist()
            assert len(batch.targets.tail_N) == len(batch.labels_N) == int(batch.lengths_B.sum())
            for utterance_id, length in zip(batch.utterance_ids, batch.lengths_B.tolist(), strict=True):
                fits = [abs(length * 0.03 - seconds[utterance_id] / speed) < 0.035 for speed in (0.9, 1.0, 1.1)]
                assert any(fits)

    def test_each_speed_is_made_once(self, speech: Speech, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        loaded = []
        load = TrainingData.load_variants

        def counting(self: TrainingData, *args: Any) -> Any:
            examples = load(self, *args)
            loaded.append(sorted(examples))
            return examples

        monkeypatch.setattr(TrainingData, "load_variants", counting)
        batches(training_data(speech, url))
        assert loaded == [[(row, Variant(speed)) for row in range(20) for speed in (0.9, 1.0, 1.1)]]
        loaded.clear()
        batches(training_data(speech, url), SMALL_POOLS)
        assert len(loaded) > 3
        assert sorted(row for pool in loaded for row, _ in pool) == sorted([*range(20)] * 3)

    @pytest.mark.parametrize("order", [ORDER, SMALL_POOLS])
    def test_can_begin_anywhere(self, speech: Speech, url: str, order: Order) -> None:
        data = training_data(speech, url)
        expected = list(data.steps(order, temperature=2.0, num_epochs=2))
        for start in (1, len(expected) // 2, len(expected) - 1):
            first = expected[start]
            found = batches(data, order, 2, first_epoch=first.epoch, first_step=first.step)
            for batch, step in zip(found, expected[start:], strict=True):
                assert_same(batch, step.batch)

    def test_batches_are_full_at_the_speeds_of_the_epoch(self, speech: Speech, url: str) -> None:
        """But for one that a single utterance overfills."""
        for batch in batches(training_data(speech, url, speeds=[0.8])):
            num_utterances, longest = len(batch.utterance_ids), int(batch.lengths_B.max()) * 0.03
            assert num_utterances == 1 or num_utterances * (longest - 0.03) <= 1.5

    def test_without_masks_and_at_speed_1_it_is_what_it_was(self, speech: Speech, url: str) -> None:
        data = training_data(speech, url, speeds=[1.0], **NO_MASKS)
        plain = TrainingData(data.corpus, FRONT_END, data.soft_labels)
        for found, expected in zip(batches(data), batches(plain), strict=True):
            assert_same(found, expected)

    def test_labels_that_are_not_one_for_each_frame(self, speech: Speech, tmp_path: Path) -> None:
        """As for an encoder that drops every second frame."""
        halved = [
            replace(u, hard_labels=u.hard_labels[::2].copy()) for u in speech.located() if u.hard_labels is not None
        ]
        corpus = save_corpus(tmp_path, halved, frame_shift_ms=60.0).corpus
        data = TrainingData(corpus, FRONT_END, [], Augmenter(Augmentation(speeds=(0.9,)), FRONT_END, 0))
        with pytest.raises(
            InputError, match=r"train-00: \d+ frames of features, \d+ of labels; .*\.speeds to \[1\.0\]"
        ):
            batches(data)


def run(speech: Speech, url: str | None, output: Path, **changes: Any) -> TrainConfig:
    table = {f"augmentation__{name}": value for name, value in TABLE.items()}
    return train_config(speech, output, url=url, training__epochs=2, **table, **changes)


def weights(config: TrainConfig) -> bytes:
    return (Path(config.output) / "model.safetensors").read_bytes()


class TestRun:
    def test_resumes_to_the_same_weights(
        self, speech: Speech, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """From a checkpoint within an epoch; other weights than without augmentation."""
        always = {"training__checkpoint_minutes": 1e-9}
        whole, stopped = run(speech, url, tmp_path / "whole"), run(speech, url, tmp_path / "stopped", **always)
        plain = train_config(speech, tmp_path / "plain", url=url, training__epochs=2)
        assert train(whole)
        assert train(plain)
        train_until_the_store_fails(stopped, monkeypatch)
        assert train(stopped)
        assert weights(stopped) == weights(whole)
        assert weights(plain) != weights(whole)

    def test_the_dev_set_is_as_it_was_recorded(
        self, speech: Speech, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        judged_by = []

        def watched(model: Any, data: TrainingData) -> Any:
            judged_by.append(data.augmenter)
            return model_posteriors(model, data)

        monkeypatch.setattr(train_module, "model_posteriors", watched)
        assert train(run(speech, url, tmp_path / "run"))
        assert judged_by == [None, None]

    def test_from_hard_labels_alone(self, speech: Speech, tmp_path: Path) -> None:
        labelled = [u for u in speech.located() if u.hard_labels is not None]
        assert train(run(save_corpus(tmp_path, labelled), None, tmp_path / "run"))

    def test_from_soft_targets_alone(self, speech: Speech, url: str, tmp_path: Path) -> None:
        here = [without_labels(u) if u.split == "train" else u for u in speech.located()]
        assert train(run(save_corpus(tmp_path, here), url, tmp_path / "run"))
