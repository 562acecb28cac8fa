"""The size of an arm's own labels is that of a dataset captured that way."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from softlabel_schemas import open_dataset
from softlabel_schemas.folds import Fold, fold_of
from softlabel_schemas.object_store import ObjectStore
from softlabel_schemas.selection import TopK
from student_trainer.stored_size import stored_bytes_per_frame
from tests.support.speech import INVENTORY, Speech, save_corpus, train_config, write_soft_labels, write_speech
from tests.support.transcripts import CTC_FRONT_END, write_ctc_labels


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Speech:
    speech = write_speech(tmp_path_factory.mktemp("size") / "speech", unlabelled_share=0.0)
    write_soft_labels(speech.folder / "wide", speech.split("train"))
    return speech


def size(speech: Speech, **soft_labels: Any) -> float | None:
    changes = {f"soft_labels__{name}": value for name, value in soft_labels.items()}
    return stored_bytes_per_frame(train_config(speech, "run", url=str(speech.folder / "wide"), **changes))


def published(url: Path) -> float:
    manifest = open_dataset(url).manifest
    return manifest.num_bytes / manifest.num_frames


@pytest.mark.parametrize("k", [1, 2, 3])
def test_as_if_captured_with_the_narrower_selection(speech: Speech, tmp_path: Path, k: int) -> None:
    narrow = {"policy": "top_k", "k": k, "keep_hard_label": True}
    write_soft_labels(tmp_path / "narrow", speech.split("train"), selection=TopK(k=k, keep_hard_label=True))
    # Their statistics differ: what each says of its kept mass is a column too.
    assert size(speech, selection=narrow) == pytest.approx(published(tmp_path / "narrow"), rel=0.01)


def test_samples_of_a_dataset_of_two_temperatures(speech: Speech, tmp_path: Path) -> None:
    """They are of one, and so is what is stored of them."""
    everything = TopK(k=INVENTORY.num_classes)
    samples = {"temperature": 1.0, "selection": {"policy": "random_sampling", "draws": 3}}
    sizes = set()
    for temperatures in ((1.0,), (1.0, 2.0)):
        url = tmp_path / f"{len(temperatures)}"
        write_soft_labels(url, speech.split("train"), selection=everything, spec={"temperatures": temperatures})
        settings = {f"soft_labels__{name}": value for name, value in samples.items()}
        sizes.add(stored_bytes_per_frame(train_config(speech, "run", url=str(url), **settings)))
    assert len(sizes) == 1


@pytest.mark.parametrize(("temperature", "needed"), [(1.0, (1.0,)), (2.0, (1.0, 2.0))])
def test_a_selection_has_the_tails_that_the_run_needs(
    speech: Speech, tmp_path: Path, temperature: float, needed: tuple[float, ...]
) -> None:
    """As samples have: what two arms take to store can be compared."""
    for name, selection, temperatures in (("wide", TopK(k=5), (1.0, 2.0, 4.0)), ("narrow", TopK(k=1), needed)):
        spec = {"temperatures": temperatures}
        write_soft_labels(tmp_path / name, speech.split("train"), selection=selection, spec=spec)
    settings = {"soft_labels__temperature": temperature, "soft_labels__selection": {"policy": "top_k", "k": 1}}
    found = stored_bytes_per_frame(train_config(speech, "run", url=str(tmp_path / "wide"), **settings))
    assert found == pytest.approx(published(tmp_path / "narrow"), rel=0.01)


@pytest.mark.parametrize("codec", ["packed-f32", "packed-u8", "mtf-sqrt"])
def test_all_that_is_stored(speech: Speech, tmp_path: Path, codec: str) -> None:
    write_soft_labels(tmp_path / "labels", speech.split("train"), spec={"codec": codec})
    config = train_config(speech, "run", url=str(tmp_path / "labels"))
    # What a lossy codec gives back is not quite what went in, and may take some bytes more or less.
    assert stored_bytes_per_frame(config) == pytest.approx(published(tmp_path / "labels"), rel=0.02)


def test_a_frame_of_weight_0_keeps_no_entry(speech: Speech) -> None:
    everything, agreeing, weighed = (
        size(speech, **more) for more in ({}, {"frames": {"disagreeing": 0.0}}, {"frames": {"disagreeing": 0.5}})
    )
    assert everything is not None
    assert agreeing is not None
    assert agreeing < everything
    assert weighed == everything


def test_hard_labels_that_are_not_in_use_decide_nothing(speech: Speech, tmp_path: Path) -> None:
    """Of a split that trains without them, such as noise, which the ensemble hardly ever agrees with."""
    splits = {"corpus__train_splits": ["train", "more"], "corpus__hard_label_splits": ["train"]}
    sizes = set()
    for shift in (1, 2, None):
        rows = [
            replace(u, split="more", hard_labels=None if shift is None else (u.hard_labels + shift) % 6) if i > 3 else u
            for i, u in enumerate(speech.located("train"))
        ]
        here = save_corpus(tmp_path, [*rows, *speech.located("dev")])
        frames = {"soft_labels__frames": {"disagreeing": 0.0}}
        config = train_config(here, "run", url=str(speech.folder / "wide"), **frames, **splits)
        sizes.add(stored_bytes_per_frame(config))
    assert len(sizes) == 1


def test_speakers_that_are_held_out_have_no_part_in_it(speech: Speech, tmp_path: Path) -> None:
    """As many bytes as of a corpus without them."""
    fold = Fold(num_folds=2, fold=fold_of("anna", 2))
    rows = [replace(u, speaker="anna" if i % 3 else "carl") for i, u in enumerate(speech.located("train"))]
    assert fold_of("carl", 2) != fold.fold
    held_out = {"corpus__num_folds": fold.num_folds, "corpus__held_out_fold": fold.fold}
    sizes = []
    for name, here, changes in (
        ("held-out", rows, held_out),
        ("without", [u for u in rows if u.speaker == "carl"], {}),
        ("all", rows, {}),
    ):
        (tmp_path / name).mkdir()
        corpus = save_corpus(tmp_path / name, here)
        sizes.append(stored_bytes_per_frame(train_config(corpus, "run", url=str(speech.folder / "wide"), **changes)))
    assert sizes[0] == sizes[1] != sizes[2]


def test_ctc_has_no_use_for_labels_of_frames(speech: Speech, tmp_path: Path) -> None:
    """Of 30 ms in the corpus, where the soft labels are of 20."""
    transcribed = [replace(utterance, text="a-1 b-1") for utterance in speech.split("train")]
    write_ctc_labels(tmp_path / "labels", transcribed)
    ctc = {"ctc": {"units": "words"}, "front_end": CTC_FRONT_END.model_dump()}
    config = train_config(speech, "run", url=str(tmp_path / "labels"), **ctc)
    assert stored_bytes_per_frame(config) == pytest.approx(published(tmp_path / "labels"), rel=0.01)


def test_each_file_is_read_once_and_kept_in_the_cache_of_the_run(
    speech: Speech, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From which the next arm of a sweep is measured."""
    reads: Counter[str] = Counter()

    def counting(method: str) -> None:
        read = getattr(ObjectStore, method)

        def call(self: ObjectStore, key: str, *args: Any, **options: Any) -> bytes:
            reads[key] += key.startswith("shards/")
            return read(self, key, *args, **options)

        monkeypatch.setattr(ObjectStore, method, call)

    counting("read")
    counting("read_range")
    narrow: dict[str, Any] = {"selection": {"policy": "top_k", "k": 2, "keep_hard_label": True}}
    expected = size(speech, **narrow)
    assert sum(reads.values()) == open_dataset(speech.folder / "wide").num_shards
    assert size(speech, cache=str(tmp_path / "cache"), **narrow) == expected
    reads.clear()
    assert size(speech, cache=str(tmp_path / "cache"), **narrow) == expected
    assert sum(reads.values()) == 0


def test_without_soft_labels_there_is_nothing(speech: Speech) -> None:
    assert stored_bytes_per_frame(train_config(speech, "run")) == 0
