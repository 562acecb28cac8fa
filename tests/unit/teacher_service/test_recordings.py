"""Labelling segments of one long recording in an archive, against labelling a file for each utterance."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import soundfile

from softlabel_schemas import write_corpus
from teacher_service.job import prepare
from teacher_service.pipeline import LabelledShard, label_shard
from teacher_service.teacher import load_teacher
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
        loaded = load_teacher(teacher, weight=1.0, device="cpu", precision="float32")
        spec, storage = job.document.spec, job.document.storage
        return label_shard(job.corpus.read(shard.first_row, shard.num_rows), [loaded], spec, storage)

    found, expected = label(manifest), label(sounds.manifest)
    assert found.skipped == []
    for ours, theirs in zip(found.utterances, expected.utterances, strict=True):
        assert ours.utterance_id == theirs.utterance_id
        assert_same_targets(ours.targets, theirs.targets)
