"""Folds of speakers: a documented function of the name, and what specs and bundles say of them."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from softlabel_schemas import InputError, load_corpus
from softlabel_schemas.bundle import BundleReader, write_bundle
from softlabel_schemas.corpus_file import CorpusFile
from softlabel_schemas.folds import Fold, SpeakerScan, fold_of, folds_of, without_fold
from softlabel_schemas.spec import DatasetSpec, TeacherSpec
from softlabel_schemas.strict import parse
from tests.support.datasets import SPEC
from tests.support.speech import FRONT_END, INVENTORY, Speech, save_corpus, write_speech

SPEAKERS = ["anna", "béla", "0001", "0002", "spk-17"]


def test_golden_folds() -> None:
    """Corpora are labelled by this cut: another one would have speakers labelled by teachers that heard them."""
    assert [fold_of(speaker, 4) for speaker in SPEAKERS] == [2, 0, 3, 1, 3]


@given(st.text(min_size=1), st.integers(2, 1000))
def test_a_fold_is_of_the_documented_hash(speaker: str, num_folds: int) -> None:
    try:
        encoded = speaker.encode()
    except UnicodeEncodeError:
        return
    digest = hashlib.sha256(encoded).digest()
    assert fold_of(speaker, num_folds) == sum(byte << 8 * (7 - i) for i, byte in enumerate(digest[:8])) % num_folds


def test_folds_are_about_equal() -> None:
    counts = np.bincount([fold_of(f"speaker-{index}", 5) for index in range(5000)])
    assert (np.abs(counts - 1000) < 150).all()


def with_speakers(speech: Speech, speakers: list[str | None]) -> Speech:
    named = [replace(utterance, speaker=speakers[i % len(speakers)]) for i, utterance in enumerate(speech.utterances)]
    return save_corpus(speech.folder, named)


@pytest.fixture
def speech(tmp_path: Path) -> Speech:
    return write_speech(tmp_path / "speech")


def test_without_a_fold(speech: Speech) -> None:
    corpus = load_corpus(with_speakers(speech, [*SPEAKERS]).manifest)
    held_out = Fold(num_folds=4, fold=fold_of("anna", 4))
    left = without_fold(corpus, held_out, where="corpus")
    expected = [row.utterance_id for row in corpus if fold_of(str(row.speaker), 4) != held_out.fold]
    assert [row.utterance_id for row in left] == expected
    assert 0 < len(left) < len(corpus)
    alone = load_corpus(with_speakers(speech, ["anna"]).manifest)
    with pytest.raises(InputError, match="all speakers of 26 utterances are in fold"):
        without_fold(alone, held_out, where="corpus")


@pytest.mark.parametrize("nobody", [None, ""])
def test_every_utterance_needs_a_speaker(speech: Speech, nobody: str | None) -> None:
    speech = with_speakers(speech, ["anna", nobody])
    with pytest.raises(InputError, match="13 utterances have no speaker, the first is row 1; folds are of speakers"):
        folds_of(load_corpus(speech.manifest).table["speaker"], 3, where="corpus")
    scan = CorpusFile(speech.manifest, ["train"]).scan(3600.0)
    with pytest.raises(InputError, match="10 utterances have no speaker, the first is train-01"):
        scan.speakers.digest(where="corpus")


def test_the_digest_of_speakers_does_not_depend_on_blocks() -> None:
    table = pa.table({"utterance_id": list("abcd"), "speaker": ["ab", "c", "a", "bc"]})
    digests = set()
    for cuts in ([0, 4], [0, 1, 4], [0, 1, 2, 3, 4], [0, 0, 4]):
        scan = SpeakerScan()
        for start, stop in itertools.pairwise(cuts):
            scan.add(table.slice(start, stop - start))
        digests.add(scan.digest(where="corpus"))
    lengths, names = (
        hashlib.sha256(np.array([2, 1, 1, 2], "<i4").tobytes()).digest(),
        hashlib.sha256(b"abcabc").digest(),
    )
    assert digests == {hashlib.sha256(lengths + names).hexdigest()}


# What the spec says


def spec_fields(**changes: Any) -> dict[str, Any]:
    teachers = [{"name": "a", "digest": "a" * 64, "weight": 1.0, "fold": fold} for fold in (0, 1)]
    return SPEC.fields() | {"teachers": teachers, "num_folds": 2, "speakers_digest": "5" * 64} | changes


def teacher(weight: float, fold: int | None) -> dict[str, Any]:
    return TeacherSpec(name="a", digest="a" * 64, weight=weight, fold=fold).model_dump()


def test_folds_are_in_the_fingerprint_and_absent_without() -> None:
    spec = parse(DatasetSpec, spec_fields(), where="spec")
    assert [member.fold for member in spec.teachers] == [0, 1]
    fingerprints = {
        spec.fingerprint(),
        parse(DatasetSpec, spec_fields(speakers_digest="6" * 64), where="").fingerprint(),
    }
    assert len(fingerprints) == 2
    assert not {"num_folds", "speakers_digest", "combined_from", "subset_of"} & set(SPEC.fields())
    assert "fold" not in SPEC.fields()["teachers"][0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speakers_digest": None}, "num_folds and speakers_digest belong together"),
        ({"num_folds": 3}, "fold 2 of 3 has no teacher"),
        ({"num_folds": 1}, "num_folds: Input should be greater than or equal to 2, found 1"),
        ({"teachers": [teacher(1, 0), teacher(1, None)]}, "every teacher needs a fold"),
        ({"teachers": [teacher(1, 0), teacher(1, 2)]}, "a teacher has fold 2, expected 0 to 1"),
        ({"teachers": [teacher(0.5, 0), teacher(1, 1)]}, "the weights of the teachers of fold 0 add up to 0.5"),
        ({"num_folds": None, "speakers_digest": None}, "a teacher has a fold, but there are no folds"),
        (
            {"combined_from": [{"content_digest": "7" * 64, "weight": 0.5}]},
            "the weights of combined_from add up to 0.5",
        ),
    ],
)
def test_specs_that_contradict_themselves(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse(DatasetSpec, spec_fields(**changes), where="spec")


# What a bundle says


def test_a_bundle_says_what_it_never_heard(tmp_path: Path) -> None:
    digests = set()
    for name, held_out in (("one", Fold(num_folds=4, fold=1)), ("two", None)):
        write_bundle(
            tmp_path / name,
            name=name,
            model=b"weights",
            factory=None,
            arguments={},
            front_end=FRONT_END,
            inventory=INVENTORY,
            frame_shift_ms=30.0,
            held_out=held_out,
        )
        found = BundleReader(tmp_path / name).description
        assert found.held_out == held_out
        digests.add(found.digest())
        assert (b"held_out" in (tmp_path / name / "teacher.json").read_bytes()) == (held_out is not None)
    # The outputs are not a function of it.
    assert len(digests) == 1


def test_folds_are_counted_from_0() -> None:
    with pytest.raises(InputError, match="fold 4 of 4 does not exist; they are counted from 0"):
        parse(Fold, {"num_folds": 4, "fold": 4}, where="fold")
    assert str(Fold(num_folds=4, fold=3)) == "fold 3 of 4"
