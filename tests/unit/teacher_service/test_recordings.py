"""Labelling segments of one long recording in an archive, against labelling a file for each utterance."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from softlabel_schemas import Utterance, load_corpus, utterance_reader, write_corpus
from softlabel_schemas.bundle import BundleReader
from softlabel_schemas.object_store import ObjectStore
from teacher_service.job import prepare
from teacher_service.pipeline import BatchDone, LabelledShard, batches_of, folds, label_shard
from teacher_service.teacher import load_teacher
from tests.support.http_server import DistantHandler, serving
from tests.support.targets import assert_same_targets
from tests.support.teachers import FRAME_SHIFT_MS, INVENTORY, SAMPLE_RATE, make_job, write_linear_teacher, write_sounds


def test_segments_have_the_labels_of_files(tmp_path: Path) -> None:
    sounds = write_sounds(tmp_path / "sounds", [0.5, 0.3, 0.4])
    parts = [soundfile.read(sounds.folder / str(row.audio), dtype="int16")[0] for row in sounds.utterances]
    soundfile.write(tmp_path / "long.flac", np.concatenate(parts), SAMPLE_RATE)
    audio = (tmp_path / "long.flac").read_bytes()
    (tmp_path / "long.tar").write_bytes(b"x" * 512 + audio + b"x" * 100)
    starts = np.cumsum([0, *map(len, parts)])
    rows = [
        replace(
            row,
            audio="long.tar",
            sha256=hashlib.sha256(audio).hexdigest(),
            start_sample=int(start),
            audio_offset=512,
            audio_bytes=len(audio),
        )
        for row, start in zip(sounds.utterances, starts, strict=False)
    ]
    manifest = str(tmp_path / "corpus.parquet")
    write_corpus(manifest, rows, inventory=INVENTORY, hard_label_frame_shift_ms=FRAME_SHIFT_MS)
    teacher = write_linear_teacher(tmp_path / "linear")

    def label(corpus: str) -> LabelledShard:
        job = prepare(make_job(corpus, [teacher], tmp_path / "labels", destination__shard_seconds=60.0))
        (shard,) = job.plan
        loaded = load_teacher(teacher, BundleReader(teacher.bundle), weight=1.0, device="cpu", precision="float32")
        spec, storage = job.document.spec, job.document.storage
        return label_shard(job.corpus.read(shard.first_row, shard.num_rows), [loaded], spec, storage)

    found, expected = label(manifest), label(sounds.manifest)
    assert found.skipped == []
    for ours, theirs in zip(found.utterances, expected.utterances, strict=True):
        assert ours.utterance_id == theirs.utterance_id
        assert_same_targets(ours.targets, theirs.targets)


@pytest.fixture
def manifest(tmp_path: Path) -> str:
    """Twelve parts of three recordings, of lengths in no order and of a speaker each."""
    rng, rows = np.random.default_rng(3), []
    for name in ("a.wav", "b.wav", "c.wav"):
        soundfile.write(tmp_path / name, rng.integers(-9_000, 9_000, 4 * SAMPLE_RATE, dtype=np.int16), SAMPLE_RATE)
    for index, seconds in enumerate(rng.permutation(np.linspace(0.2, 1.0, 12))):
        rows.append(
            Utterance(
                utterance_id=f"u{index:02}",
                audio=f"{'abc'[index % 3]}.wav",
                start_sample=index // 3 * SAMPLE_RATE,
                num_samples=int(SAMPLE_RATE * seconds),
                sample_rate=SAMPLE_RATE,
                speaker=f"s{index}",
                split="train",
            )
        )
    write_corpus(tmp_path / "corpus.parquet", rows)
    return str(tmp_path / "corpus.parquet")


def test_each_recording_is_fetched_once(manifest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With memory for one alone."""
    fetched: list[str] = []
    read = ObjectStore.read

    def counted(self: ObjectStore, key: str, *, max_bytes: int | None = None) -> bytes:
        fetched.append(key)
        return read(self, key, max_bytes=max_bytes)

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(utterance_reader, "_KEPT_BYTES", 1)
    teacher = write_linear_teacher(tmp_path / "linear")
    job = prepare(
        make_job(
            manifest, [teacher], tmp_path / "labels", resources__batch_seconds=1.2, destination__shard_seconds=60.0
        )
    )
    (shard,) = job.plan
    loaded = load_teacher(teacher, BundleReader(teacher.bundle), weight=1.0, device="cpu", precision="float32")
    monkeypatch.setattr(ObjectStore, "read", counted)
    batches: list[BatchDone] = []
    labelled = label_shard(
        job.corpus.read(shard.first_row, shard.num_rows),
        [loaded],
        job.document.spec,
        job.document.storage,
        on_batch=batches.append,
    )
    assert len(labelled.utterances) == 12
    assert len(batches) > 3
    assert sorted(name for name in fetched if name.endswith(".wav")) == ["a.wav", "b.wav", "c.wav"]


def test_batches_of_recordings_are_of_one_fold(manifest: str) -> None:
    rows = load_corpus(manifest)
    fold_N = np.array(folds(rows, 2))
    batches = [batch for batch, _ in batches_of(rows, [], 2, 1.2)]
    assert sorted(row for batch in batches for row in batch) == list(range(12))
    assert all(len(set(fold_N[batch])) == 1 for batch in batches)


def test_several_files_come_from_a_url_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few processors the teachers have; the labels are the same."""

    class Handler(DistantHandler): ...

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    sounds = write_sounds(tmp_path / "sounds", [0.5] * 12)
    teacher = write_linear_teacher(tmp_path / "linear")
    loaded = load_teacher(teacher, BundleReader(teacher.bundle), weight=1.0, device="cpu", precision="float32")

    def label(manifest: str) -> LabelledShard:
        job = prepare(
            make_job(
                manifest, [teacher], tmp_path / "labels", destination__shard_seconds=60.0, resources__batch_seconds=1.0
            )
        )
        (shard,) = job.plan
        spec, storage = job.document.spec, job.document.storage
        return label_shard(job.corpus.read(shard.first_row, shard.num_rows), [loaded], spec, storage)

    here = label(sounds.manifest)
    with serving(sounds.folder, Handler) as url:
        there = label(f"{url}/{Path(sounds.manifest).name}")
    assert len(there.utterances) == 12
    for ours, theirs in zip(there.utterances, here.utterances, strict=True):
        assert_same_targets(ours.targets, theirs.targets)
    assert 3 < Handler.most_at_once <= 8
