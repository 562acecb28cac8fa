"""The published targets as a run uses them: joined by utterance id, narrowed, weighed; and what does not fit is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softlabel_schemas import InputError, open_dataset
from softlabel_schemas.frame_selection import FrameSelection, frame_weights, silence_classes
from softlabel_schemas.selection import Mass, TopK
from student_trainer.batch import collate
from student_trainer.config import FrameWeights, SoftLabelConfig
from student_trainer.data import TrainingData
from student_trainer.soft_labels import SoftLabels
from tests.support.speech import (
    FRONT_END,
    INVENTORY,
    TEMPERATURES,
    SoftDataset,
    Speech,
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
    return TrainingData(speech.corpus.select_splits(["train"]), FRONT_END, [soft_labels] if soft_labels else [])


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
            assert found.weights_T is None
            np.testing.assert_array_equal(found.soft.offsets, expected.offsets)
            np.testing.assert_array_equal(found.soft.class_ids, expected.class_ids)
            np.testing.assert_array_equal(found.soft.log_probs, expected.log_probs)
            np.testing.assert_allclose(found.soft.tail_mass, expected.tail_mass, atol=1e-6)

    def test_an_utterance_without_hard_labels_has_none_to_keep(self, speech: Speech, labels: SoftDataset) -> None:
        utterance = without_labels(speech.utterances[5])
        (found,) = join(speech, labels.url, selection=TopK(k=2, keep_hard_label=True)).of([utterance])
        assert set(found.soft.counts_T) == {2}

    def test_frame_weights_are_of_all_that_is_stored(self, speech: Speech, labels: SoftDataset) -> None:
        """Also where less is kept, and of the hard labels that are in use."""
        frames = FrameWeights(disagreeing=0.0, uncertain=0.5, min_top1=0.6)
        soft_labels = join(speech, labels.url, frames=frames, selection=TopK(k=1))
        here = [speech.utterances[4], without_labels(speech.utterances[5])]
        silence_V = silence_classes(INVENTORY, frames)
        for utterance, found in zip(here, soft_labels.of(here), strict=True):
            stored = labels.targets[utterance.utterance_id]
            labels_T = utterance.hard_labels
            if labels_T is None:
                labels_T = np.full(stored.num_frames, -1)
            np.testing.assert_array_equal(found.weights_T, frame_weights(stored, labels_T, silence_V, frames))
        corpus_weights = [soft_labels.of([u])[0].weights_T for u in speech.split("train")]
        examples = training_data(speech, soft_labels).load(range(20))
        batch = collate([examples[row] for row in (7, 2)])
        assert batch.targets is not None
        np.testing.assert_array_equal(batch.targets.weights_N, np.concatenate([corpus_weights[7], corpus_weights[2]]))
        assert set(np.concatenate(corpus_weights)) == {np.float32(0), np.float32(0.5), np.float32(1)}

    def test_frames_that_the_selection_drops_weigh_nothing(self, speech: Speech, labels: SoftDataset) -> None:
        """They have no entries, and with some tail modes the tail would be a target."""
        wanted, utterances = TopK(k=2, frames=FrameSelection(disagreeing=0.0)), speech.split("train")
        num_dropped = 0
        for whole, found in zip(
            join(speech, labels.url).of(utterances),
            join(speech, labels.url, selection=wanted, frames=FrameWeights(uncertain=0.5, min_top1=0.6)).of(utterances),
            strict=True,
        ):
            assert found.weights_T is not None
            assert (found.soft.counts_T <= whole.soft.counts_T).all()
            np.testing.assert_array_equal(found.weights_T == 0, found.soft.counts_T == 0)
            num_dropped += int((found.weights_T == 0).sum())
        assert num_dropped > 0

    def test_frames_of_silence_need_an_inventory_that_names_it(
        self, speech: Speech, labels: SoftDataset, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        dataset = open_dataset(labels.url)
        nameless = INVENTORY.model_copy(update={"silence_phones": ()})
        monkeypatch.setattr(type(dataset), "inventory", nameless, raising=False)
        config = SoftLabelConfig(url=labels.url, frames=FrameWeights(silence=0.0))
        with pytest.raises(InputError, match="the class inventory names no silence_phones"):
            SoftLabels(dataset, config, speech.corpus, INVENTORY.digest())

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

    def test_a_temperature_that_the_codec_cannot_tell(self, speech: Speech, new_labels: Callable[..., str]) -> None:
        spec = {"temperatures": (1.0, 4.0), "codec": "mtf-sqrt"}
        url = new_labels(selection=TopK(k=INVENTORY.num_classes), spec=spec)
        with pytest.raises(InputError, match=f"^{url}: temperature 4 is asked for, but codec 'mtf-sqrt' stores every"):
            join(speech, url, temperature=4.0)
        join(speech, url)

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
