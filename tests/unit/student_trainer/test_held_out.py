"""A fold of speakers that is held out: no part of training, none of the dev speech, and the bundle says so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from softlabel_schemas import InputError, load_corpus
from softlabel_schemas.bundle import BundleReader
from softlabel_schemas.folds import Fold, fold_of, without_fold
from student_trainer.export import export
from student_trainer.run_folder import RUN, RunFolder
from student_trainer.train import train
from tests.support.speech import Speech, save_corpus, train_config, write_speech

SPEAKERS = ("anna", "bert", "carl", "dora", "emil")
HELD_OUT = Fold(num_folds=2, fold=fold_of("anna", 2))
FIELDS = {"corpus__num_folds": HELD_OUT.num_folds, "corpus__held_out_fold": HELD_OUT.fold}


@pytest.fixture
def speech(tmp_path: Path) -> Speech:
    """The speech of those who are held out does not exist: it cannot have been heard."""
    speech = write_speech(tmp_path / "speech")
    named = [replace(row, speaker=SPEAKERS[i % len(SPEAKERS)]) for i, row in enumerate(speech.utterances)]
    for row in named:
        if fold_of(str(row.speaker), HELD_OUT.num_folds) == HELD_OUT.fold:
            (speech.folder / str(row.audio)).unlink()
    return save_corpus(speech.folder, named)


def test_they_are_never_heard(speech: Speech, tmp_path: Path) -> None:
    output = tmp_path / "run"
    train(train_config(speech, output, training__epochs=1, **FIELDS))
    left = without_fold(load_corpus(speech.manifest).select_splits(["train"]), HELD_OUT, where="corpus")
    assert 0 < len(left) < 20
    assert RunFolder(output).read_json(RUN)["corpus_digest"] == left.digest
    export(output, tmp_path / "bundle")
    assert BundleReader(tmp_path / "bundle").description.held_out == HELD_OUT


@pytest.mark.parametrize("splits", ["train_splits", "dev_splits"])
def test_nobody_is_left(speech: Speech, tmp_path: Path, splits: str) -> None:
    rows = [
        replace(row, split="alone") if row.speaker == "anna" and row.split == "train" else row
        for row in speech.utterances
    ]
    config = train_config(
        save_corpus(speech.folder, rows), tmp_path / "run", **FIELDS, **{f"corpus__{splits}": ["alone"]}
    )
    with pytest.raises(InputError, match=r"all speakers of 4 utterances are in fold \d of 2, which is held out"):
        train(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"corpus__num_folds": 2}, "num_folds and held_out_fold belong together: give both or neither"),
        ({"corpus__held_out_fold": 0}, "num_folds and held_out_fold belong together: give both or neither"),
        ({"corpus__num_folds": 2, "corpus__held_out_fold": 2}, "held_out_fold is 2, expected 0 to 1"),
        ({"corpus__num_folds": 2, "corpus__held_out_fold": False}, "Input should be a valid integer"),
    ],
)
def test_settings_that_contradict_themselves(speech: Speech, fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_config(speech, "run", **fields)
