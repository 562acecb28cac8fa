"""Out-of-fold labelling: each utterance's labels are those of its fold's teachers alone."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softlabel_schemas import InputError, open_dataset
from softlabel_schemas.dataset import SoftLabelDataset
from softlabel_schemas.folds import Fold, fold_of
from softlabel_schemas.verification import verify
from teacher_service.batching import batch_rows, batch_rows_by_fold
from teacher_service.config import JobConfig, TeacherConfig, load_job
from teacher_service.job import prepare
from teacher_service.teacher import load_teachers
from tests.support.labelling import run_here
from tests.support.targets import assert_same_targets
from tests.support.teachers import Sounds, job_fields, make_job, write_job, write_linear_teacher, write_sounds

SECONDS = [0.9, 0.3, 1.5, 0.61, 0.6, 1.2, 0.35, 0.8, 0.45, 0.7]
SPEAKERS = ("anna", "bert", "carl", "dora", "emil")
# Weights of the teachers of each fold; relative within it.
WEIGHTS = ((1.0, 3.0), (5.0,))


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Sounds:
    return named(write_sounds(tmp_path_factory.mktemp("sounds"), SECONDS), SPEAKERS)


def named(sounds: Sounds, speakers: tuple[str | None, ...]) -> Sounds:
    rows = [replace(row, speaker=speakers[i % len(speakers)]) for i, row in enumerate(sounds.utterances)]
    return replace(sounds, utterances=tuple(rows)).write()


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> list[TeacherConfig]:
    """Of each fold, one after the other."""
    folder = tmp_path_factory.mktemp("bundles")
    return [
        write_linear_teacher(
            folder / f"{fold}-{index}", seed=10 * fold + index, held_out=Fold(num_folds=2, fold=fold)
        ).model_copy(update={"weight": weight, "fold": fold})
        for fold, weights in enumerate(WEIGHTS)
        for index, weight in enumerate(weights)
    ]


def label(config: JobConfig) -> SoftLabelDataset:
    """As a job does, with one actor and without Ray."""
    job = prepare(config)
    run_here(job)
    return open_dataset(config.destination.url)


def fold_job(sounds: Sounds, teachers: list[TeacherConfig], url: Path, **changes: Any) -> JobConfig:
    settings = {"corpus__num_folds": 2, "destination__shard_seconds": 60.0, "selection": {"policy": "top_k", "k": 12}}
    return make_job(sounds.manifest, teachers, url, **settings | changes)


def test_each_utterance_has_the_labels_of_its_folds_teachers(
    sounds: Sounds, teachers: list[TeacherConfig], tmp_path: Path
) -> None:
    """Bit for bit those of a job without folds, with these teachers and the speakers of the fold."""
    dataset = label(fold_job(sounds, teachers, tmp_path / "labels"))
    assert [problem for _, problem in verify(dataset) if problem] == []
    spec = dataset.manifest.spec
    assert [(each.fold, each.weight) for each in spec.teachers] == [(0, 0.25), (0, 0.75), (1, 1.0)]
    assert spec.num_folds == 2
    seen = 0
    for fold in range(2):
        rows = tuple(row for row in sounds.utterances if fold_of(str(row.speaker), 2) == fold)
        own = replace(sounds, folder=tmp_path / f"fold-{fold}", utterances=located(sounds, rows))
        own.folder.mkdir()
        members = [each.model_copy(update={"fold": None}) for each in teachers if each.fold == fold]
        alone = label(fold_job(own.write(), members, tmp_path / f"alone-{fold}", corpus={"manifest": own.manifest}))
        for row in rows:
            assert_same_targets(dataset[row.utterance_id].targets, alone[row.utterance_id].targets)
        seen += len(rows)
        assert rows
    assert seen == len(dataset) == len(SECONDS)


def located(sounds: Sounds, rows: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(replace(row, audio=f"{sounds.folder}/{row.audio}") for row in rows)


def test_the_other_folds_teachers_are_not_run(tmp_path: Path) -> None:
    """One that would fail on every utterance labels only a fold that nobody is in."""
    sounds = named(write_sounds(tmp_path / "sounds", [0.5, 0.4]), ("anna",))
    own = fold_of("anna", 2)
    members = [
        write_linear_teacher(
            tmp_path / str(fold), held_out=Fold(num_folds=2, fold=fold), rank=3 if fold == own else 2
        ).model_copy(update={"fold": fold})
        for fold in range(2)
    ]
    assert len(label(fold_job(sounds, members, tmp_path / "labels"))) == 2


def test_batches_are_of_one_fold() -> None:
    rng = np.random.default_rng(1)
    seconds_N, fold_N = rng.uniform(1, 10, 50), rng.integers(0, 3, 50)
    batches = batch_rows_by_fold(seconds_N, fold_N, 30.0)
    assert sorted(row for batch in batches for row in batch) == list(range(50))
    for batch in batches:
        assert len(set(fold_N[batch])) == 1
        assert len(batch) == 1 or seconds_N[batch].max() * len(batch) <= 30.0
    of_fold = [batch for batch in batches if fold_N[batch[0]] == 1]
    rows = np.flatnonzero(fold_N == 1)
    assert of_fold == [[rows[row] for row in batch] for batch in batch_rows(seconds_N[rows], 30.0)]


def test_speakers_are_in_the_fingerprint(sounds: Sounds, teachers: list[TeacherConfig], tmp_path: Path) -> None:
    """The corpus digest does not cover them, and here they decide the labels."""
    before = prepare(fold_job(sounds, teachers, tmp_path / "labels")).document.spec
    folder = tmp_path / "renamed"
    folder.mkdir()
    other = named(replace(sounds, folder=folder, utterances=located(sounds, sounds.utterances)), SPEAKERS[::-1])
    after = prepare(fold_job(other, teachers, tmp_path / "labels")).document.spec
    assert before.corpus_digest == after.corpus_digest
    assert before.fingerprint() != after.fingerprint()


# What is refused


def test_a_corpus_without_speakers(sounds: Sounds, teachers: list[TeacherConfig], tmp_path: Path) -> None:
    nameless = named(write_sounds(tmp_path / "sounds", [0.3, 0.4]), ("anna", None))
    with pytest.raises(InputError, match="1 utterances have no speaker, the first is utt-001"):
        prepare(fold_job(nameless, teachers, tmp_path / "labels"))


def test_a_teacher_that_may_have_heard_the_fold(sounds: Sounds, teachers: list[TeacherConfig], tmp_path: Path) -> None:
    first, _, last = teachers
    swapped = [first.model_copy(update={"fold": 1}), last.model_copy(update={"fold": 0})]
    message = "0-0: its training held out fold 0 of 2, the job has it label fold 1 of 2"
    with pytest.raises(InputError, match=message):
        prepare(fold_job(sounds, swapped, tmp_path / "labels"))
    silent = write_linear_teacher(tmp_path / "silent").model_copy(update={"fold": 0})
    hint = 'add "held_out": {"num_folds":2,"fold":0} there'
    with pytest.raises(InputError, match=re.escape(hint)):
        prepare(fold_job(sounds, [silent, last], tmp_path / "labels"))


def test_a_teacher_of_another_fold_that_took_its_place_since(sounds: Sounds, tmp_path: Path) -> None:
    """The digest does not cover the fold."""
    members = [
        write_linear_teacher(tmp_path / str(fold), held_out=Fold(num_folds=2, fold=fold)).model_copy(
            update={"fold": fold}
        )
        for fold in range(2)
    ]
    job = prepare(fold_job(sounds, members, tmp_path / "labels"))
    write_linear_teacher(tmp_path / "1", held_out=Fold(num_folds=2, fold=0))
    message = "1: its training held out fold 0 of 2, the job has it label fold 1 of 2"
    with pytest.raises(InputError, match=message):
        load_teachers(job.config, job.document.spec)


@pytest.mark.parametrize(
    ("folds", "num_folds", "message"),
    [
        ((0, None), 2, "num_folds is 2: every teacher needs a fold"),
        ((0, 0), 2, "fold 1 of 2 has no teacher; every fold needs one"),
        ((0, 2), 2, "a teacher has fold 2, expected 0 to 1"),
        ((0, 1), None, "a teacher has a fold, but there are no folds: give num_folds too"),
    ],
)
def test_jobs_that_contradict_themselves(
    tmp_path: Path, folds: tuple[int | None, ...], num_folds: int | None, message: str
) -> None:
    fields = job_fields("corpus.parquet", [TeacherConfig(bundle="a", fold=fold) for fold in folds], "labels")
    if num_folds is not None:
        fields["corpus"]["num_folds"] = num_folds
    with pytest.raises(InputError, match=message):
        load_job(write_job(tmp_path / "job.toml", fields))
