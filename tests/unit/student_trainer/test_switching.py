"""Several datasets of one corpus, one of which teaches each batch."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softlabel_schemas import InputError, open_dataset
from softlabel_schemas.front_end import Fbank
from softlabel_schemas.targets import concatenate
from student_trainer.augmentation import Augmenter
from student_trainer.batch import sparse_targets
from student_trainer.compare import compare
from student_trainer.config import Augmentation, SoftLabelConfig, TrainConfig, load_config
from student_trainer.data import TrainingData
from student_trainer.order import Order
from student_trainer.soft_labels import SoftLabels
from student_trainer.stored_size import stored_bytes_per_frame
from student_trainer.switching import dataset_of_step
from student_trainer.train import train
from tests.support.datasets import write_dataset
from tests.support.disturbed import train_until_killed
from tests.support.runs import HARD, write_run
from tests.support.speech import (
    FRONT_END,
    INVENTORY,
    SoftDataset,
    Speech,
    train_config,
    write_soft_labels,
    write_speech,
)

ORDERS = [Order(seed=1, batch_seconds=1.5, pool_seconds=seconds) for seconds in (36_000.0, 3.0)]
TOML = """
name = "student"
output = "{output}"
seed = 7
corpus = {{ manifest = "{speech.manifest}", inventory = "{speech.inventory}" }}
soft_labels = {{ urls = {urls}, temperature = 2.0 }}
augmentation = {{ speeds = [0.9, 1.1] }}
front_end = {{ kind = "fbank", sample_rate = 8000, num_mel_bins = 8, stack = 3 }}
model = {{ architecture = "tdnn", arguments = {{ hidden = 16, num_layers = 2 }} }}
training = {{ epochs = 2, batch_seconds = 1.5, learning_rate = 0.01, checkpoint_minutes = 1e-9, num_threads = 1 }}
"""


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Speech:
    return write_speech(tmp_path_factory.mktemp("switching") / "speech")


@pytest.fixture(scope="module")
def labels(speech: Speech) -> list[SoftDataset]:
    """Of three teachers, who say other things: each dataset has its own order, and random numbers go by that."""
    train_speech = speech.split("train")
    return [
        write_soft_labels(speech.folder / f"labels-{teacher}", [*train_speech[teacher:], *train_speech[:teacher]])
        for teacher in range(3)
    ]


def switched(speech: Speech, labels: list[SoftDataset], augmenter: Augmenter | None = None) -> TrainingData:
    corpus = speech.corpus.select_splits(["train"])
    config = SoftLabelConfig(urls=tuple(each.url for each in labels), temperature=2.0)
    joined = [SoftLabels(open_dataset(url), config, corpus, INVENTORY.digest()) for url in config.locations]
    return TrainingData(corpus, FRONT_END, joined, augmenter)


def config_of(speech: Speech, output: Path, *urls: str, **changes: Any) -> TrainConfig:
    return train_config(speech, output, soft_labels={"urls": urls}, training__epochs=1, **changes)


class TestChoice:
    def test_is_even_and_another_for_each_seed_epoch_and_step(self) -> None:
        chosen = [
            tuple(dataset_of_step(seed, epoch, step, 3) for step in range(300)) for seed in (0, 1) for epoch in (0, 1)
        ]
        assert len(set(chosen)) == 4
        for of_epoch in chosen:
            # 100 of each are expected, with a standard deviation of 8.
            assert all(60 < number < 140 for number in Counter(of_epoch).values())

    @pytest.mark.parametrize("order", ORDERS, ids=["one-pool", "many-pools"])
    def test_each_batch_has_the_targets_of_the_dataset_that_was_drawn(
        self, speech: Speech, labels: list[SoftDataset], order: Order
    ) -> None:
        data = switched(speech, labels)
        taught = []
        for step in data.steps(order, temperature=2.0, num_epochs=2):
            teacher = dataset_of_step(order.seed, step.epoch, step.step, 3)
            soft = concatenate([labels[teacher].targets[name] for name in step.batch.utterance_ids])
            expected = sparse_targets(soft, 2.0)
            assert step.batch.targets is not None
            np.testing.assert_array_equal(step.batch.targets.ids_NK, expected.ids_NK)
            np.testing.assert_array_equal(step.batch.targets.probs_NK, expected.probs_NK)
            taught.append(teacher)
        assert set(taught) == {0, 1, 2}

    @pytest.mark.parametrize("order", ORDERS, ids=["one-pool", "many-pools"])
    def test_can_begin_anywhere(self, speech: Speech, labels: list[SoftDataset], order: Order) -> None:
        """At other speeds too."""
        assert isinstance(FRONT_END, Fbank)
        data = switched(speech, labels, Augmenter(Augmentation(speeds=(0.9, 1.1)), FRONT_END, seed=1))
        expected = list(data.steps(order, temperature=2.0, num_epochs=2))
        for start in (1, len(expected) // 2, len(expected) - 1):
            first = expected[start]
            found = data.steps(order, temperature=2.0, num_epochs=2, first_epoch=first.epoch, first_step=first.step)
            for step, same in zip(found, expected[start:], strict=True):
                assert step.batch.targets is not None
                assert same.batch.targets is not None
                np.testing.assert_array_equal(step.batch.targets.probs_NK, same.batch.targets.probs_NK)


def test_killed_and_resumed_it_has_the_weights_of_an_undisturbed_run(
    speech: Speech, labels: list[SoftDataset], tmp_path: Path
) -> None:
    for output in ("killed", "undisturbed"):
        urls = json.dumps([each.url for each in labels])
        (tmp_path / f"{output}.toml").write_text(TOML.format(speech=speech, output=output, urls=urls))
    train_until_killed(tmp_path / "killed.toml")
    assert len(json.loads((tmp_path / "killed" / "run.json").read_bytes())["history"]) == 1
    for output in ("killed", "undisturbed"):
        assert train(load_config(tmp_path / f"{output}.toml"))
    weights = [(tmp_path / output / "model.safetensors").read_bytes() for output in ("killed", "undisturbed")]
    assert weights[0] == weights[1]
    run = json.loads((tmp_path / "killed" / "run.json").read_bytes())
    assert run["dataset_digest"] == [open_dataset(each.url).manifest.content_digest for each in labels]


class TestRefused:
    def test_a_dataset_of_another_inventory(self, speech: Speech, labels: list[SoftDataset], tmp_path: Path) -> None:
        other = write_dataset(str(tmp_path / "other"), shard_format="parquet").url
        with pytest.raises(InputError, match=r"other: labels are of class inventory"):
            train(config_of(speech, tmp_path / "run", labels[0].url, other))

    def test_a_dataset_of_another_frame_shift(self, speech: Speech, labels: list[SoftDataset], tmp_path: Path) -> None:
        other = write_soft_labels(tmp_path / "other", speech.split("train"), spec={"frame_shift_ms": 12.5}).url
        with pytest.raises(InputError, match=r"other: frame shift of the soft targets is 12\.5 ms"):
            train(config_of(speech, tmp_path / "run", labels[0].url, other))

    def test_resuming_with_other_labels(self, speech: Speech, labels: list[SoftDataset], tmp_path: Path) -> None:
        second = tmp_path / "second"
        write_soft_labels(second, speech.split("train"))
        config = config_of(speech, tmp_path / "run", labels[0].url, str(second))
        assert train(config)
        second.rename(tmp_path / "first-version")
        write_soft_labels(second, speech.split("train")[::-1])
        with pytest.raises(InputError, match="another dataset_digest"):
            train(config)
        with pytest.raises(InputError, match="another dataset_digest"):
            train(config_of(speech, tmp_path / "run", str(second), labels[0].url))


def test_what_any_of_them_skipped_is_left_out(
    speech: Speech, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    urls = [
        write_soft_labels(tmp_path / name, speech.split("train"), skipped=skipped).url
        for name, skipped in (("a", {"train-03": "x"}), ("b", {"train-03": "x", "train-07": "y"}))
    ]
    assert train(config_of(speech, tmp_path / "run", *urls))
    run = json.loads((tmp_path / "run" / "run.json").read_bytes())
    assert [entry["utterance_id"] for entry in run["left_out"]] == ["train-03", "train-07"]
    said = capsys.readouterr().err
    assert f"left out 1 of 20 utterances (5%), for which {urls[1]} has no labels: train-07: y" in said


def test_all_of_them_count_in_what_the_labels_take(speech: Speech, labels: list[SoftDataset], tmp_path: Path) -> None:
    config = config_of(speech, tmp_path / "run", labels[0].url, labels[1].url)
    alone = [train_config(speech, tmp_path / "run", url=each.url) for each in labels[:2]]
    sizes = [stored_bytes_per_frame(each) for each in alone]
    assert stored_bytes_per_frame(config) == pytest.approx(sum(sizes))
    written = [write_dataset(str(tmp_path / f"labels-{index}"), shard_format="parquet") for index in range(2)]
    digests = [each.manifest.content_digest for each in written]
    run = write_run(tmp_path / "runs", "switched", HARD[0], dataset="d" * 64, dataset_digest=digests)
    stored = [each.manifest.num_bytes / each.manifest.num_frames for each in written]
    for given, expected in ((written, pytest.approx(sum(stored))), (written[:0], None)):
        comparison = compare([run], [], [each.url for each in given], ["test"])
        assert comparison.bytes_per_frame(comparison.arms[0]) == expected
