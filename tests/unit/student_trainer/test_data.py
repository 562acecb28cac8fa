"""The feed: a reproducible order, and the join of features, hard labels and soft targets by utterance id."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from softlabel_schemas import InputError, open_dataset
from softlabel_schemas.front_end import UtteranceError
from softlabel_schemas.selection import Mass, TopK
from softlabel_schemas.targets import SoftTargets, concatenate
from student_trainer.config import SoftLabelConfig
from student_trainer.data import Example, SoftLabels, TrainingData, collate, epoch_pools, sparse_targets
from tests.support.speech import (
    FRONT_END,
    INVENTORY,
    TEMPERATURES,
    SoftDataset,
    Speech,
    save_corpus,
    without_labels,
    write_soft_labels,
    write_speech,
)
from tests.support.targets import assert_same_targets, ranking, targets_from_dense

NO_LABELS = "train-05"


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Speech:
    return write_speech(tmp_path_factory.mktemp("data") / "speech")


@pytest.fixture(scope="module")
def labels(speech: Speech) -> SoftDataset:
    """Stored in another order than the corpus's, and with utterances of another split in between."""
    order = np.random.default_rng(0).permutation(23)
    return write_soft_labels(speech.folder / "labels", [speech.utterances[index] for index in order])


@pytest.fixture
def new_labels(speech: Speech, tmp_path: Path) -> Callable[..., str]:
    return lambda **kwargs: write_soft_labels(tmp_path / "labels", speech.split("train"), **kwargs).url


def join(speech: Speech, url: str, inventory_digest: str = INVENTORY.digest(), **settings: Any) -> SoftLabels:
    corpus = speech.corpus.select_splits(["train"])
    return SoftLabels(open_dataset(url), SoftLabelConfig(url=url, **settings), corpus, inventory_digest)


def training_data(speech: Speech, soft_labels: SoftLabels | None = None) -> TrainingData:
    return TrainingData(speech.corpus.select_splits(["train"]), FRONT_END, soft_labels)


durations = st.lists(st.floats(0.05, 20.0), min_size=1, max_size=60)


class TestOrder:
    @given(
        seconds=durations,
        seed=st.integers(0, 2**32 - 1),
        epoch=st.integers(0, 100),
        batch_seconds=st.floats(0.01, 60.0),
        pool_seconds=st.floats(0.5, 500.0),
    )
    def test_every_row_once_within_the_bounds(
        self, seconds: list[float], seed: int, epoch: int, batch_seconds: float, pool_seconds: float
    ) -> None:
        seconds_N = np.array(seconds)
        settings = {"seed": seed, "epoch": epoch, "batch_seconds": batch_seconds, "pool_seconds": pool_seconds}
        pools = epoch_pools(seconds_N, **settings)
        assert sorted(row for pool in pools for rows in pool for row in rows) == list(range(len(seconds)))
        for pool in pools:
            assert pool
            # Eight runs of rows, each filled until it is full.
            in_pool = sum(seconds[row] for rows in pool for row in rows)
            assert in_pool <= pool_seconds + 8 * max(seconds) + 1e-6
            for rows in pool:
                assert len(rows) == 1 or len(rows) * max(seconds[row] for row in rows) <= batch_seconds
        assert epoch_pools(seconds_N, **settings) == pools

    def test_another_seed_or_epoch_is_another_order(self) -> None:
        seconds_N = np.random.default_rng(0).uniform(1, 9, 100)
        orders = [
            str(epoch_pools(seconds_N, seed=seed, epoch=epoch, batch_seconds=30.0, pool_seconds=100.0))
            for seed in (0, 1)
            for epoch in (0, 1)
        ]
        assert len(set(orders)) == 4

    def test_batches_are_of_like_lengths_and_not_the_same_every_epoch(self) -> None:
        seconds_N = np.random.default_rng(0).uniform(1, 9, 400)
        batches = []
        for epoch in (0, 1):
            (pool,) = epoch_pools(seconds_N, seed=0, epoch=epoch, batch_seconds=60.0, pool_seconds=1e9)
            padded = sum(len(rows) * seconds_N[rows].max() for rows in pool)
            assert padded < 1.2 * seconds_N.sum()
            batches.append({frozenset(rows) for rows in pool})
        assert len(batches[0] & batches[1]) < len(batches[0]) / 4

    @pytest.mark.parametrize("pool_seconds", [36_000.0, 2.0])
    def test_the_same_with_and_without_soft_labels(
        self, speech: Speech, labels: SoftDataset, pool_seconds: float
    ) -> None:
        settings = {"seed": 1, "first_epoch": 0, "num_epochs": 2, "batch_seconds": 1.5, "pool_seconds": pool_seconds}
        without = [pool.batches for pool in training_data(speech).pools(**settings)]
        with_soft = [pool.batches for pool in training_data(speech, join(speech, labels.url)).pools(**settings)]
        assert without == with_soft


class TestPools:
    def test_small_pools_give_the_examples_of_one_large_pool(self, speech: Speech, labels: SoftDataset) -> None:
        data = training_data(speech, join(speech, labels.url))
        settings = {"seed": 1, "first_epoch": 1, "num_epochs": 3, "batch_seconds": 1.5}
        (whole, last) = data.pools(**settings, pool_seconds=36_000.0)
        assert (whole.epoch, last.epoch) == (1, 2)
        assert last.examples is whole.examples
        pools = list(data.pools(**settings, pool_seconds=1.0))
        assert len(pools) == 6
        for epoch in (1, 2):
            of_epoch = [pool for pool in pools if pool.epoch == epoch]
            assert sorted(row for pool in of_epoch for row in pool.examples) == list(range(20))
            assert [pool.ends_epoch for pool in of_epoch] == [False] * (len(of_epoch) - 1) + [True]
            step = 0
            for pool in of_epoch:
                assert pool.first_step == step
                assert sorted(row for rows in pool.batches for row in rows) == sorted(pool.examples)
                step += len(pool.batches)
                for row, example in pool.examples.items():
                    assert_same_example(example, whole.examples[row])
            assert {pool.num_steps for pool in of_epoch} == {step}

    def test_an_unreadable_file_ends_the_iteration(self, speech: Speech, tmp_path: Path) -> None:
        utterances = speech.located("train")
        utterances[6] = replace(utterances[6], audio="missing.wav")
        data = training_data(save_corpus(tmp_path, utterances))
        pools = data.pools(seed=0, first_epoch=0, num_epochs=1, batch_seconds=1.5, pool_seconds=1.0)
        with pytest.raises(UtteranceError, match=r"utterance train-06: missing\.wav does not exist"):
            list(pools)


def assert_same_example(found: Example, expected: Example) -> None:
    assert found.utterance_id == expected.utterance_id
    np.testing.assert_array_equal(found.features, expected.features, strict=True)
    np.testing.assert_array_equal(found.hard_labels, expected.hard_labels, strict=True)
    assert found.soft is not None
    assert expected.soft is not None
    assert_same_targets(found.soft, expected.soft)


class TestJoin:
    def test_is_by_id(self, speech: Speech, labels: SoftDataset) -> None:
        examples = training_data(speech, join(speech, labels.url)).load(range(20))
        stored = [utterance.utterance_id for utterance in open_dataset(labels.url)]
        assert stored != sorted(stored)
        for row, utterance in enumerate(speech.split("train")):
            example = examples[row]
            assert example.utterance_id == utterance.utterance_id
            np.testing.assert_array_equal(example.hard_labels, utterance.hard_labels)
            assert example.hard_labels.dtype == np.int64
            assert len(example.features) == len(utterance.hard_labels)
            assert_same_targets(example.soft, labels.targets[utterance.utterance_id])

    def test_a_narrower_selection(self, speech: Speech, labels: SoftDataset) -> None:
        wanted = TopK(k=1, keep_hard_label=True)
        for utterance, found in zip(
            speech.split("train"), join(speech, labels.url, selection=wanted).of(speech.split("train")), strict=True
        ):
            log_posterior_TV = labels.log_posteriors[utterance.utterance_id]
            kept_TV = np.zeros(log_posterior_TV.shape, dtype=bool)
            np.put_along_axis(kept_TV, ranking(log_posterior_TV)[:, :1], True, axis=1)
            labelled = np.flatnonzero(utterance.hard_labels >= 0)
            kept_TV[labelled, utterance.hard_labels[labelled]] = True
            expected = targets_from_dense(log_posterior_TV, kept_TV, TEMPERATURES)
            np.testing.assert_array_equal(found.offsets, expected.offsets)
            np.testing.assert_array_equal(found.class_ids, expected.class_ids)
            np.testing.assert_array_equal(found.log_probs, expected.log_probs)
            np.testing.assert_allclose(found.tail_mass, expected.tail_mass, atol=1e-6)

    def test_an_utterance_without_hard_labels_has_none_to_keep(self, speech: Speech, labels: SoftDataset) -> None:
        utterance = without_labels(speech.utterances[5])
        (found,) = join(speech, labels.url, selection=TopK(k=2, keep_hard_label=True)).of([utterance])
        assert set(found.counts_T) == {2}

    def test_another_inventory(self, speech: Speech, labels: SoftDataset) -> None:
        message = rf"inventory {INVENTORY.digest()[:12]} \(6 classes\), the student's is {'a' * 12}"
        with pytest.raises(InputError, match=message):
            join(speech, labels.url, inventory_digest="a" * 64)

    def test_another_frame_shift(self, speech: Speech, new_labels: Callable[..., str]) -> None:
        with pytest.raises(InputError, match=r"soft targets is 12\.5 ms, of the hard labels 30 ms"):
            join(speech, new_labels(spec={"frame_shift_ms": 12.5}))

    def test_a_temperature_that_is_not_stored(self, speech: Speech, labels: SoftDataset) -> None:
        with pytest.raises(InputError, match=r"temperature 1\.5 is asked for, tails are stored for 1, 2"):
            join(speech, labels.url, temperature=1.5)

    @pytest.mark.parametrize(
        ("stored", "wanted", "reason"),
        [
            (TopK(k=3), TopK(k=3, keep_hard_label=True), "the hard label was not always kept"),
            (TopK(k=3), TopK(k=4), "at most 3 entries per frame were kept, 4 are asked for"),
            (Mass(mass=0.9, max_entries=3), TopK(k=3), "'top_k' selection needs entries that a 'mass' selection"),
            (Mass(mass=0.9, max_entries=3), Mass(mass=0.95, max_entries=3), "mass 0.9 was kept, 0.95 is asked for"),
        ],
    )
    def test_a_selection_that_cannot_be_derived(
        self, speech: Speech, new_labels: Callable[..., str], stored: Any, wanted: Any, reason: str
    ) -> None:
        with pytest.raises(InputError, match=reason):
            join(speech, new_labels(selection=stored), selection=wanted)

    def test_an_utterance_that_is_not_in_the_dataset(self, speech: Speech, tmp_path: Path) -> None:
        url = write_soft_labels(tmp_path / "labels", speech.split("train")[:19]).url
        with pytest.raises(InputError, match="no soft targets for utterance train-19: no such utterance"):
            training_data(speech, join(speech, url)).load(range(20))

    def test_an_utterance_that_was_skipped(self, speech: Speech, new_labels: Callable[..., str]) -> None:
        url = new_labels(skipped={"train-03": "its audio is empty"})
        with pytest.raises(InputError, match="utterance train-03: it was skipped: its audio is empty"):
            training_data(speech, join(speech, url)).load(range(20))

    def test_another_length(self, speech: Speech, new_labels: Callable[..., str]) -> None:
        num_frames = len(speech.utterances[2].hard_labels)
        soft_labels = join(speech, new_labels(extra_frames={"train-02": 2}))
        message = f"utterance train-02: {num_frames + 2} frames of soft targets, {num_frames} of hard labels"
        with pytest.raises(InputError, match=message):
            training_data(speech, soft_labels).load(range(20))

    def test_neither_hard_labels_nor_soft_targets(self, tmp_path: Path) -> None:
        speech = write_speech(tmp_path, unlabelled=[NO_LABELS])
        with pytest.raises(InputError, match=f"utterance {NO_LABELS} has neither hard labels nor soft targets"):
            training_data(speech).load(range(20))

    def test_soft_targets_alone(self, tmp_path: Path) -> None:
        speech = write_speech(tmp_path / "speech", unlabelled=[NO_LABELS])
        url = write_soft_labels(tmp_path / "labels", speech.split("train")).url
        examples = training_data(speech, join(speech, url)).load([4, 5])
        assert examples[5].hard_labels is None
        batch = collate(list(examples.values()))
        first, second = (len(example.features) for example in examples.values())
        assert batch.label_lengths_B.tolist() == [first, second]
        assert batch.labels_N[first:].tolist() == [-1] * second
        assert (batch.labels_N[:first] >= 0).any()


class TestCollate:
    def test_pads_features_and_joins_frames(self, speech: Speech, labels: SoftDataset) -> None:
        rows = [3, 0, 6]
        examples = training_data(speech, join(speech, labels.url)).load(rows)
        chosen = [examples[row] for row in rows]
        batch = collate(chosen, temperature=2.0)
        lengths = [len(example.features) for example in chosen]
        assert batch.utterance_ids == ("train-03", "train-00", "train-06")
        assert batch.lengths_B.tolist() == batch.label_lengths_B.tolist() == lengths
        assert batch.features_BTD.shape == (3, max(lengths), FRONT_END.num_features)
        for row, example in enumerate(chosen):
            assert torch.equal(batch.features_BTD[row, : lengths[row]], torch.from_numpy(example.features))
            assert not batch.features_BTD[row, lengths[row] :].any()
        np.testing.assert_array_equal(batch.labels_N, np.concatenate([example.hard_labels for example in chosen]))
        joined = sparse_targets(concatenate([soft(example) for example in chosen]), 2.0)
        assert batch.targets is not None
        for name in ("ids_NK", "probs_NK", "tail_N"):
            assert torch.equal(getattr(batch.targets, name), getattr(joined, name))
        assert len(joined.tail_N) == sum(lengths)

    def test_without_soft_targets(self, speech: Speech) -> None:
        assert collate(list(training_data(speech).load([0, 1]).values())).targets is None


def soft(example: Example) -> SoftTargets:
    assert example.soft is not None
    return example.soft
