"""The feed: a reproducible order of batches of features, hard labels and soft targets."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from softlabel_schemas import load_corpus, open_dataset
from softlabel_schemas.targets import SoftTargets, concatenate
from softlabel_schemas.utterance_reader import UtteranceError
from student_trainer import data as data_module
from student_trainer.batch import Batch, Example, collate, sparse_targets
from student_trainer.config import SoftLabelConfig
from student_trainer.data import Step, TrainingData
from student_trainer.order import Order
from student_trainer.soft_labels import SoftLabels
from tests.support.http_server import DistantHandler, serving
from tests.support.speech import (
    FRONT_END,
    INVENTORY,
    SoftDataset,
    Speech,
    save_corpus,
    write_soft_labels,
    write_speech,
)


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Speech:
    return write_speech(tmp_path_factory.mktemp("data") / "speech")


@pytest.fixture(scope="module")
def labels(speech: Speech) -> SoftDataset:
    """Stored in another order than the corpus's, and with utterances of another split in between."""
    order = np.random.default_rng(0).permutation(23)
    return write_soft_labels(speech.folder / "labels", [speech.utterances[index] for index in order])


def join(speech: Speech, url: str, inventory_digest: str = INVENTORY.digest(), **settings: Any) -> SoftLabels:
    corpus = speech.corpus.select_splits(["train"])
    return SoftLabels(open_dataset(url), SoftLabelConfig(url=url, **settings), corpus, inventory_digest)


def training_data(speech: Speech, soft_labels: SoftLabels | None = None) -> TrainingData:
    return TrainingData(speech.corpus.select_splits(["train"]), FRONT_END, [soft_labels] if soft_labels else [])


def test_several_files_come_from_a_url_at_once(speech: Speech) -> None:
    class Handler(DistantHandler): ...

    rows = list(range(10))
    expected = training_data(speech).load(rows)
    with serving(speech.folder, Handler) as url:
        corpus = load_corpus(f"{url}/{Path(speech.manifest).name}").select_splits(["train"])
        found = TrainingData(corpus, FRONT_END).load(rows)
    assert list(found) == list(expected) == rows
    for row in rows:
        np.testing.assert_array_equal(found[row].features, expected[row].features)
    assert 3 < Handler.most_at_once <= 8


def steps(data: TrainingData, order: Order, num_epochs: int = 2, **settings: Any) -> list[Step]:
    return list(data.steps(order, temperature=2.0, num_epochs=num_epochs, **settings))


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
        order = Order(seed=seed, batch_seconds=batch_seconds, pool_seconds=pool_seconds)
        pools = order.pools(seconds_N, epoch)
        assert sorted(row for pool in pools for rows in pool for row in rows) == list(range(len(seconds)))
        for pool in pools:
            assert pool
            # Eight runs of rows, each filled until it is full.
            in_pool = sum(seconds[row] for rows in pool for row in rows)
            assert in_pool <= pool_seconds + 8 * max(seconds) + 1e-6
            for rows in pool:
                assert len(rows) == 1 or len(rows) * max(seconds[row] for row in rows) <= batch_seconds
        assert order.pools(seconds_N, epoch) == pools

    def test_another_seed_or_epoch_is_another_order(self) -> None:
        seconds_N = np.random.default_rng(0).uniform(1, 9, 100)
        orders = [
            str(Order(seed=seed, batch_seconds=30.0, pool_seconds=100.0).pools(seconds_N, epoch))
            for seed in (0, 1)
            for epoch in (0, 1)
        ]
        assert len(set(orders)) == 4

    def test_batches_are_of_like_lengths_and_not_the_same_every_epoch(self) -> None:
        seconds_N = np.random.default_rng(0).uniform(1, 9, 400)
        batches = []
        for epoch in (0, 1):
            (pool,) = Order(seed=0, batch_seconds=60.0, pool_seconds=1e9).pools(seconds_N, epoch)
            padded = sum(len(rows) * seconds_N[rows].max() for rows in pool)
            assert padded < 1.2 * seconds_N.sum()
            batches.append({frozenset(rows) for rows in pool})
        assert len(batches[0] & batches[1]) < len(batches[0]) / 4

    @pytest.mark.parametrize("pool_seconds", [36_000.0, 2.0])
    def test_the_same_with_and_without_soft_labels(
        self, speech: Speech, labels: SoftDataset, pool_seconds: float
    ) -> None:
        order = Order(seed=1, batch_seconds=1.5, pool_seconds=pool_seconds)
        without = steps(training_data(speech), order)
        with_soft = steps(training_data(speech, join(speech, labels.url)), order)
        assert [step.batch.utterance_ids for step in without] == [step.batch.utterance_ids for step in with_soft]


class TestSteps:
    ORDER = Order(seed=1, batch_seconds=1.5, pool_seconds=1.0)

    def test_are_the_batches_of_the_order(self, speech: Speech, labels: SoftDataset) -> None:
        data = training_data(speech, join(speech, labels.url))
        found = iter(steps(data, self.ORDER))
        for epoch in (0, 1):
            pools = self.ORDER.pools(data.seconds_N, epoch)
            assert len(pools) == 3
            batches = [rows for pool in pools for rows in pool]
            assert data.num_steps(self.ORDER, epoch) == len(batches)
            for number, rows in enumerate(batches):
                step = next(found)
                assert (step.epoch, step.step, step.num_steps) == (epoch, number, len(batches))
                assert step.ends_epoch == (number + 1 == len(batches))
                examples = data.load(rows)
                assert_same_batch(step.batch, collate([examples[row] for row in rows], temperature=2.0))
        assert next(found, None) is None

    @pytest.mark.parametrize("pool_seconds", [1.0, 36_000.0])
    def test_can_begin_anywhere(self, speech: Speech, labels: SoftDataset, pool_seconds: float) -> None:
        data = training_data(speech, join(speech, labels.url))
        order = Order(seed=1, batch_seconds=1.5, pool_seconds=pool_seconds)
        everything = steps(data, order)
        for start, first in enumerate(everything):
            for step, expected in zip(
                steps(data, order, first_epoch=first.epoch, first_step=first.step), everything[start:], strict=True
            ):
                assert (step.epoch, step.step, step.num_steps) == (expected.epoch, expected.step, expected.num_steps)
                assert_same_batch(step.batch, expected.batch)
        after = steps(data, order, first_epoch=0, first_step=everything[0].num_steps)
        assert [step.epoch for step in after] == [1] * data.num_steps(order, 1)

    def test_a_corpus_of_one_pool_is_loaded_once(
        self, speech: Speech, labels: SoftDataset, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        load, calls = TrainingData.load_variants, []

        def counting(self: TrainingData, *args: Any) -> Any:
            calls.append(args)
            return load(self, *args)

        monkeypatch.setattr(TrainingData, "load_variants", counting)
        data = training_data(speech, join(speech, labels.url))
        steps(data, Order(seed=1, batch_seconds=1.5, pool_seconds=36_000.0), num_epochs=3)
        assert len(calls) == 1
        steps(data, self.ORDER, num_epochs=3)
        assert len(calls) == 1 + 9

    def test_all_are_made_by_other_threads(
        self, speech: Speech, labels: SoftDataset, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        here, makers = threading.get_ident(), set()
        load = TrainingData.load_variants

        def recording(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                makers.add((function, threading.get_ident()))
                return function(*args, **kwargs)

            return call

        monkeypatch.setattr(TrainingData, "load_variants", recording(load))
        monkeypatch.setattr(data_module, "collate", recording(collate))
        steps(training_data(speech, join(speech, labels.url)), self.ORDER)
        assert {function for function, _ in makers} == {load, collate}
        assert len({thread for _, thread in makers} | {here}) == 3

    def test_an_unreadable_file_ends_the_iteration(self, speech: Speech, tmp_path: Path) -> None:
        utterances = speech.located("train")
        utterances[6] = replace(utterances[6], audio="missing.wav")
        data = training_data(save_corpus(tmp_path, utterances))
        with pytest.raises(UtteranceError, match=r"utterance train-06: missing\.wav does not exist"):
            steps(data, self.ORDER)

    def test_nothing_is_loaded_after_it_was_left(
        self, speech: Speech, labels: SoftDataset, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A load that was under way stops at its next utterance."""
        load, events = TrainingData.load_variants, []
        loads, left = threading.Event(), threading.Event()

        def slow(self: TrainingData, variants_of: Any, given_up: threading.Event) -> Any:
            if len(events) == 1:
                loads.set()
                assert left.wait(30)
                events.append(len(load(self, variants_of, given_up)))
                return {}
            events.append(len(variants_of))
            return load(self, variants_of, given_up)

        monkeypatch.setattr(TrainingData, "load_variants", slow)
        # Threads of an earlier test may be about to end.
        before = set(threading.enumerate())
        found = training_data(speech, join(speech, labels.url)).steps(self.ORDER, temperature=2.0, num_epochs=2)
        next(found)
        assert loads.wait(30)
        found.close()
        left.set()
        while set(threading.enumerate()) - before:
            time.sleep(0.001)
        assert len(events) == 2
        assert events[1] == 0


def assert_same_batch(found: Batch, expected: Batch) -> None:
    assert found.utterance_ids == expected.utterance_ids
    for name in ("features_BTD", "lengths_B", "labels_N", "label_lengths_B"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert found.targets is not None
    assert expected.targets is not None
    for name in ("ids_NK", "probs_NK", "tail_N"):
        assert torch.equal(getattr(found.targets, name), getattr(expected.targets, name)), name


class TestBatchesToEvaluate:
    def test_of_a_corpus_that_is_kept_are_read_once(self, tmp_path: Path) -> None:
        own = write_speech(tmp_path / "speech")
        corpus = own.corpus.select_splits(["dev"])
        seconds = float(corpus.seconds().sum())
        kept = TrainingData(corpus, FRONT_END, keep_seconds=seconds)
        read = TrainingData(corpus, FRONT_END, keep_seconds=seconds - 0.01)
        before = [batch for _, batch in read.batches_to_evaluate(torch.device("cpu"))]
        for _ in range(2):
            found = list(kept.batches_to_evaluate(torch.device("cpu")))
            for (examples, batch), expected in zip(found, before, strict=True):
                assert batch.utterance_ids == expected.utterance_ids == tuple(each.utterance_id for each in examples)
                assert torch.equal(batch.features_BTD, expected.features_BTD)
                assert torch.equal(batch.labels_N, expected.labels_N)
            for path in own.folder.glob("*.wav"):
                path.unlink()
        with pytest.raises(UtteranceError, match="dev-"):
            list(read.batches_to_evaluate(torch.device("cpu")))


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
