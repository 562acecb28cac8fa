"""Datasets of samples, budgets and dropped frames: labelled, published, verified, and read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softlabel_schemas import InputError, open_dataset, verify
from softlabel_schemas.commit import begin, commit_shard, publish
from softlabel_schemas.inventory import ClassInventory
from softlabel_schemas.shard import LabelledUtterance
from teacher_service.config import JobConfig, TeacherConfig
from teacher_service.job import prepare
from teacher_service.pipeline import label_shard
from teacher_service.teacher import load_teachers
from tests.support.targets import assert_same_targets, assert_within_bound
from tests.support.teachers import INVENTORY, Sounds, make_job, write_linear_teacher, write_sounds

WITH_SILENCE = ClassInventory(names=INVENTORY.names, phones=("SIL",) * 4 + ("a",) * 8, silence_phones=("SIL",))
SELECTIONS: list[dict[str, Any]] = [
    {"policy": "random_sampling", "draws": 20, "seed": 3},
    {"policy": "head_and_sample", "k": 2, "draws": 5, "frames": {"silence": 0}},
    {"policy": "byte_budget", "bytes_per_frame": 6, "max_entries": 9, "frames": {"uncertain": 0, "min_top1": 0.8}},
    {"policy": "mass", "mass": 0.5, "max_entries": 9, "keep_hard_label": True, "frames": {"disagreeing": 0}},
]


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Sounds:
    return write_sounds(tmp_path_factory.mktemp("sounds"), [0.9, 0.3, 1.5, 0.61]).write(inventory=WITH_SILENCE)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> TeacherConfig:
    return write_linear_teacher(tmp_path_factory.mktemp("bundles") / "linear", inventory=WITH_SILENCE)


def label(config: JobConfig, *, is_published: bool = True) -> list[LabelledUtterance]:
    """Label all shards, and publish them."""
    job = prepare(config)
    spec, storage, store = job.document.spec, job.document.storage, job.store()
    teachers = load_teachers(config, job.document.spec)
    begin(store, job.document, job.inventory)
    labelled = []
    for part in job.plan:
        shard = label_shard(job.corpus.read(part.first_row, part.num_rows), teachers, spec, storage)
        commit_shard(store, job.document, part, shard.utterances, shard.skipped)
        labelled += shard.utterances
    if is_published:
        publish(store, job.document)
    return labelled


@pytest.mark.parametrize("codec", ["mtf-sqrt", "packed-u8"])
@pytest.mark.parametrize("selection", SELECTIONS, ids=lambda selection: selection["policy"])
def test_verify_passes_and_what_is_read_is_what_was_labelled(
    sounds: Sounds, teacher: TeacherConfig, tmp_path: Path, selection: dict[str, Any], codec: str
) -> None:
    container = "zarr" if codec == "packed-u8" else "parquet"
    changes = {"destination__format": container, "targets__codec": codec, "selection": selection}
    labelled = label(make_job(sounds.manifest, [teacher], tmp_path / "labels", **changes))
    dataset = open_dataset(str(tmp_path / "labels"))
    assert [problem for _, problem in verify(dataset) if problem] == []
    num_empty = 0
    for own in labelled:
        (stored,) = dataset.read_utterances([own.utterance_id])
        assert_within_bound(codec, stored.targets, own.targets)
        empty_T = own.targets.counts_T == 0
        np.testing.assert_array_equal(stored.targets.tail_mass[empty_T], 1)
        num_empty += int(empty_T.sum())
    num_frames = sum(own.targets.num_frames for own in labelled)
    assert 0 < num_empty < num_frames if "frames" in selection else num_empty == 0


@pytest.mark.parametrize("selection", SELECTIONS[:2], ids=lambda selection: selection["policy"])
def test_neither_batches_nor_shards_change_a_draw(
    sounds: Sounds, teacher: TeacherConfig, tmp_path: Path, selection: dict[str, Any]
) -> None:
    """A linear teacher's posteriors are the same in any batch."""
    cuts: list[dict[str, Any]] = [
        {"resources__batch_seconds": 60.0, "destination__shard_seconds": 60.0},
        {"resources__batch_seconds": 0.5, "destination__shard_seconds": 1.0},
    ]
    jobs = [
        make_job(sounds.manifest, [teacher], tmp_path / f"labels-{index}", selection=selection, **cut)
        for index, cut in enumerate(cuts)
    ]
    assert [len(prepare(job).plan) > 1 for job in jobs] == [False, True]
    for first, second in zip(*(label(job, is_published=False) for job in jobs), strict=True):
        assert_same_targets(first.targets, second.targets)


def test_a_job_that_samples_at_another_temperature(sounds: Sounds, teacher: TeacherConfig, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"temperatures must be \[1\.0\], found \[1\.0, 2\.0\]"):
        make_job(
            *(sounds.manifest, [teacher], tmp_path / "labels"),
            selection=SELECTIONS[0],
            targets__temperatures=[1.0, 2.0],
        )


def test_a_job_that_drops_silence_of_classes_without_any(tmp_path: Path) -> None:
    """Found before a model is loaded."""
    sounds = write_sounds(tmp_path / "sounds", [0.3])
    teachers = [write_linear_teacher(tmp_path / "teacher")]
    job = make_job(sounds.manifest, teachers, tmp_path / "labels", selection=SELECTIONS[1])
    with pytest.raises(InputError, match="the class inventory names no silence_phones"):
        prepare(job)
