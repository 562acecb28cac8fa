"""A shard from corpus rows to labels, against the same computed utterance by utterance in float64."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import soundfile
import torch

from softlabel_schemas import Corpus, Utterance
from softlabel_schemas.bundle import BundleReader, write_bundle
from softlabel_schemas.codec import build_codec
from softlabel_schemas.containers import CONTAINERS
from softlabel_schemas.folds import Fold
from softlabel_schemas.front_end import Fbank
from softlabel_schemas.manifest import SkippedUtterance
from softlabel_schemas.plan import ShardRange
from softlabel_schemas.shard import LabelledUtterance, encode_columns
from softlabel_schemas.utterance_reader import UtteranceError
from teacher_service.config import JobConfig, TeacherConfig
from teacher_service.job import PreparedJob, prepare
from teacher_service.pipeline import BatchDone, LabelledShard, label_shard
from teacher_service.teacher import Teacher, load_teacher
from tests.support.targets import assert_same_targets, dense_posterior
from tests.support.teachers import (
    INVENTORY,
    LOUDNESS,
    Sounds,
    eager_model,
    export,
    make_job,
    select_densely,
    write_linear_teacher,
    write_sounds,
    write_teacher,
)

SECONDS = [0.9, 0.3, 1.5, 0.61, 0.6, 1.2, 0.35, 0.8]
TEMPERATURES = (1.0, 2.0)
# Two teachers that differ in architecture, front end and weight.
ENSEMBLE = (("conv_glu", 40, 1.0), ("blstm", 64, 3.0))


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Sounds:
    return write_sounds(tmp_path_factory.mktemp("sounds"), SECONDS)


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory: pytest.TempPathFactory) -> list[TeacherConfig]:
    folder = tmp_path_factory.mktemp("bundles")
    return [
        write_teacher(folder / name, name, num_mel_bins=bins).model_copy(update={"weight": weight})
        for name, bins, weight in ENSEMBLE
    ]


def load_all(job: PreparedJob) -> list[Teacher]:
    members = zip(job.config.teachers, job.document.spec.teachers, strict=True)
    return [
        load_teacher(t, BundleReader(t.bundle), weight=m.weight, device="cpu", precision="float32") for t, m in members
    ]


def label_all(config: JobConfig, **changes: Any) -> LabelledShard:
    """The whole corpus as one shard."""
    job = prepare(config)
    assert len(job.plan) == 1
    storage = job.document.storage.model_copy(update=changes)
    return label_shard(rows_of(job, job.plan[0]), load_all(job), job.document.spec, storage)


def rows_of(job: PreparedJob, shard_range: ShardRange) -> Corpus:
    return job.corpus.read(shard_range.first_row, shard_range.num_rows)


def posterior(sounds: Sounds, row: Utterance, method: str) -> npt.NDArray[np.float32]:
    """Log-posterior float32 [T, V] of the ensemble, from the WAV file and the models before export; unbatched."""
    samples, _ = soundfile.read(sounds.folder / str(row.audio), dtype="int16")
    posteriors = []
    for architecture, bins, _ in ENSEMBLE:
        features_TD = Fbank(num_mel_bins=bins).compute(samples.astype(np.float32))
        with torch.inference_mode():
            logits_BTV, _ = eager_model(architecture, bins)(
                torch.from_numpy(features_TD)[None], torch.tensor([len(features_TD)])
            )
        posteriors.append(dense_posterior(logits_BTV[0].numpy(), 1.0))
    first, second = (weight / 4 for *_, weight in ENSEMBLE)
    if method == "arithmetic":
        return np.log(first * posteriors[0] + second * posteriors[1]).astype(np.float32)
    product_TV = posteriors[0] ** first * posteriors[1] ** second
    return np.log(product_TV / product_TV.sum(axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("method", ["arithmetic", "log_linear"])
@pytest.mark.parametrize(
    "selection",
    [
        {"policy": "top_k", "k": 3, "keep_hard_label": True},
        {"policy": "mass", "mass": 0.9, "max_entries": 8},
        {"policy": "threshold", "min_prob": 0.05, "max_entries": 12},
    ],
    ids=lambda selection: selection["policy"],
)
def test_equals_one_utterance_after_the_other(
    sounds: Sounds, ensemble: list[TeacherConfig], tmp_path: Path, method: str, selection: dict[str, Any]
) -> None:
    config = make_job(
        sounds.manifest,
        ensemble,
        tmp_path / "labels",
        destination__shard_seconds=60.0,
        combination__method=method,
        targets__temperatures=TEMPERATURES,
        selection=selection,
    )
    shard = label_all(config)
    assert [labelled.utterance_id for labelled in shard.utterances] == [row.utterance_id for row in sounds.utterances]
    assert shard.skipped == []
    differing = 0
    for row, found in zip(sounds.utterances, shard.utterances, strict=True):
        log_posterior_TV = posterior(sounds, row, method)
        labels_T = np.full(len(log_posterior_TV), -1) if row.hard_labels is None else row.hard_labels
        expected = select_densely(log_posterior_TV, config.selection, TEMPERATURES, labels_T)
        assert found.targets.num_frames == expected.num_frames
        for frame in range(expected.num_frames):
            ours, theirs = found.targets.frames(frame, frame + 1), expected.frames(frame, frame + 1)
            if not np.array_equal(ours.class_ids, theirs.class_ids):
                differing += 1
                continue
            np.testing.assert_allclose(ours.log_probs, theirs.log_probs, rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(ours.tail_mass, theirs.tail_mass, rtol=1e-3, atol=1e-5)
        check_stats(found, log_posterior_TV, expected.kept_mass_T(), labels_T)
    # Of 626: where two classes are as likely, or the mass is just reached, rounding decides.
    assert differing <= 2


def check_stats(
    found: LabelledUtterance,
    log_posterior_TV: npt.NDArray[np.float32],
    kept_mass_T: npt.NDArray[np.float64],
    labels_T: npt.NDArray[np.integer],
) -> None:
    posterior_TV = dense_posterior(log_posterior_TV, 1.0)
    assert found.stats.kept_mass == pytest.approx(kept_mass_T.mean(), abs=5e-3)
    assert found.stats.entropy == pytest.approx(-(posterior_TV * np.log(posterior_TV)).sum(axis=1).mean(), abs=1e-4)
    num_labelled, num_right = int((labels_T >= 0).sum()), int((posterior_TV.argmax(axis=1) == labels_T).sum())
    if num_labelled:
        assert abs(found.stats.agreement * num_labelled - num_right) <= 1.001
    else:
        assert np.isnan(found.stats.agreement)


def test_made_twice_it_has_the_same_bytes(sounds: Sounds, ensemble: list[TeacherConfig], tmp_path: Path) -> None:
    config = make_job(sounds.manifest, ensemble, tmp_path / "labels", destination__shard_seconds=60.0)
    codec = build_codec(prepare(config).document.spec)
    files = [
        {
            name: container.encode(encode_columns(label_all(config).utterances, codec), codec.zstd_level)
            for name, container in CONTAINERS.items()
        }
        for _ in range(2)
    ]
    assert files[0] == files[1]


def test_a_shard_is_its_rows_alone(sounds: Sounds, ensemble: list[TeacherConfig], tmp_path: Path) -> None:
    """Batched otherwise: the same entries, up to rounding."""
    config = make_job(sounds.manifest, ensemble, tmp_path / "labels", destination__shard_seconds=60.0)
    job, whole = prepare(config), label_all(config)
    done: list[BatchDone] = []
    part = label_shard(
        rows_of(job, ShardRange(index=1, first_row=3, num_rows=3)),
        load_all(job),
        job.document.spec,
        job.document.storage.model_copy(update={"batch_seconds": 1.3}),
        on_batch=done.append,
    )
    assert [labelled.utterance_id for labelled in part.utterances] == ["utt-003", "utt-004", "utt-005"]
    for found, expected in zip(part.utterances, whole.utterances[3:6], strict=True):
        np.testing.assert_array_equal(found.targets.class_ids, expected.targets.class_ids)
        np.testing.assert_allclose(found.targets.log_probs, expected.targets.log_probs, rtol=1e-3, atol=1e-4)
    assert [batch.seconds for batch in done] == pytest.approx([1.2, 1.21])
    assert [batch.padded_seconds for batch in done] == pytest.approx([1.2, 1.22])
    frames = [labelled.targets.num_frames for labelled in part.utterances]
    assert sum(batch.num_frames for batch in done) == sum(frames)
    assert all(0 < batch.teacher_seconds < 60 for batch in done)


# Errors


def broken(folder: Path) -> Sounds:
    """Five utterances; one of each kind that cannot be labelled, and the first, which can."""
    sounds = write_sounds(folder, [0.5] * 5, loud=[4])
    rows = list(sounds.utterances)
    (folder / str(rows[1].audio)).unlink()
    rows[2] = replace(rows[2], num_samples=rows[2].num_samples + 7)
    (folder / str(rows[3].audio)).write_bytes(b"RIFF")
    return replace(sounds, utterances=tuple(rows)).write()


def test_skip(tmp_path: Path) -> None:
    """Files that are missing, of another length or no audio, and posteriors that are not finite."""
    sounds = broken(tmp_path / "sounds")
    teacher = write_linear_teacher(tmp_path / "teacher", nan_above=LOUDNESS)
    config = make_job(sounds.manifest, [teacher], tmp_path / "labels", destination__shard_seconds=60.0)
    shard = label_all(config, on_error="skip")
    assert [labelled.utterance_id for labelled in shard.utterances] == ["utt-000"]
    reasons = [
        ("utt-001", r"utt-001: utt-001\.wav does not exist"),
        (
            "utt-002",
            r"utt-002: utt-002\.wav has \(sample rate, samples, channels\) \(16000, 8000, 1\), "
            r"the corpus manifest says \(16000, 8007, 1\)",
        ),
        # Without the address of an object in memory: reasons are stored.
        ("utt-003", r"utt-003: utt-003\.wav is not readable audio: Format not recognised\."),
        ("utt-004", "utt-004: the teachers' posteriors are not finite"),
    ]
    for entry, (utterance_id, reason) in zip(shard.skipped, reasons, strict=True):
        assert isinstance(entry, SkippedUtterance)
        assert entry.utterance_id == utterance_id
        assert re.fullmatch(f"utterance {reason}", entry.reason)
        assert str(tmp_path) not in entry.reason


def test_what_is_skipped_does_not_change_the_others(tmp_path: Path) -> None:
    """Bit for bit, although they share a batch."""
    sounds = write_sounds(tmp_path / "sounds", [0.5, 0.5, 0.5], loud=[1])
    url = tmp_path / "labels"
    shards = [
        label_all(
            make_job(
                sounds.manifest,
                [write_linear_teacher(tmp_path / name, nan_above=threshold)],
                url,
                destination__shard_seconds=60.0,
            ),
            on_error="skip",
        )
        for name, threshold in (("strict", LOUDNESS), ("lenient", 1e9))
    ]
    kept, every = shards[0].utterances, shards[1].utterances
    assert [labelled.utterance_id for labelled in kept] == ["utt-000", "utt-002"]
    assert_same_targets(kept[0].targets, every[0].targets)
    assert_same_targets(kept[1].targets, every[2].targets)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (1, "utt-001.wav does not exist"),
        (2, "the corpus manifest says (16000, 8007, 1)"),
        (3, "utt-003.wav is not readable audio"),
        (4, "utterance utt-004: the teachers' posteriors are not finite"),
    ],
)
def test_fail(tmp_path: Path, row: int, message: str) -> None:
    sounds = broken(tmp_path / "sounds")
    sounds = replace(sounds, utterances=(sounds.utterances[0], sounds.utterances[row])).write()
    teacher = write_linear_teacher(tmp_path / "teacher", nan_above=LOUDNESS)
    config = make_job(sounds.manifest, [teacher], tmp_path / "labels", destination__shard_seconds=60.0)
    with pytest.raises(UtteranceError, match=re.escape(message)):
        label_all(config)


def with_labels(folder: Path, row: int, labels_T: npt.NDArray[np.int32]) -> Sounds:
    """Three utterances; that in ``row`` has these hard labels."""
    sounds = write_sounds(folder, [0.5, 0.5, 0.5])
    rows = list(sounds.utterances)
    rows[row] = replace(rows[row], hard_labels=labels_T)
    return replace(sounds, utterances=tuple(rows)).write()


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ([0] * 49, "the teachers give 50 frames, the corpus has 49 hard labels; both need the same frame shift"),
        ([], "the teachers give 50 frames, the corpus has 0 hard labels; both need the same frame shift"),
        ([0] * 49 + [12], "hard labels run from 0 to 12, expected -1 (none) to 11"),
        ([-2] + [3] * 49, "hard labels run from -2 to 3, expected -1 (none) to 11"),
    ],
)
def test_hard_labels_that_do_not_fit(tmp_path: Path, labels: list[int], reason: str) -> None:
    sounds = with_labels(tmp_path / "sounds", 1, np.array(labels, dtype=np.int32))
    teacher = write_linear_teacher(tmp_path / "teacher")
    config = make_job(
        sounds.manifest,
        [teacher],
        tmp_path / "labels",
        destination__shard_seconds=60.0,
        errors__on_error="skip",
        selection__keep_hard_label=True,
        selection__policy="top_k",
        selection__k=4,
    )
    shard = label_all(config)
    assert [labelled.utterance_id for labelled in shard.utterances] == ["utt-000", "utt-002"]
    assert shard.skipped == [SkippedUtterance(utterance_id="utt-001", reason=f"utterance utt-001: {reason}")]
    with pytest.raises(UtteranceError, match=re.escape(f"utterance utt-001: {reason}")):
        label_all(config, on_error="fail")


def faulty_job(folder: Path, fault: str, seconds: Sequence[float] = (0.5, 0.5, 0.5, 0.5), **changes: Any) -> JobConfig:
    """Four utterances; for the third, teacher "linear" is right and teacher "faulty" is not."""
    sounds = write_sounds(folder / "sounds", seconds, loud=[2])
    teachers = [
        write_linear_teacher(folder / "right"),
        write_linear_teacher(
            folder / "faulty", factory="tests.support.teachers:faulty_model", fault=fault, above=LOUDNESS
        ),
    ]
    return make_job(sounds.manifest, teachers, folder / "labels", destination__shard_seconds=60.0, **changes)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("one frame less", "teachers disagree on its frames: 'linear' gives 50, 'linear' 49"),
        ("no frames", "teachers disagree on its frames: 'linear' gives 50, 'linear' 0"),
        ("classes", "teacher 'linear' gives logits of shape (1, 50, 11), expected [1, frames, 12]"),
        ("rank", "teacher 'linear' gives logits of shape (50, 12), expected [1, frames, 12]"),
        ("beyond", "teacher 'linear' gives lengths from 1050 to 1050 for logits of 50 frames"),
        ("negative", "teacher 'linear' gives lengths from -950 to -950 for logits of 50 frames"),
        ("real lengths", "teacher 'linear' gives lengths of shape (1,) and type torch.float32, expected integers [1]"),
        ("one length", "teacher 'linear' gives lengths of shape (1, 1) and type torch.int64, expected integers [1]"),
        ("logits alone", "teacher 'linear' gives no pair of tensors, expected logits and their lengths"),
    ],
)
def test_a_teacher_that_is_wrong_about_one_utterance(tmp_path: Path, fault: str, reason: str) -> None:
    """Also where its whole batch is unusable: the others are labelled."""
    config = faulty_job(tmp_path, fault)
    shard = label_all(config, on_error="skip")
    assert [labelled.utterance_id for labelled in shard.utterances] == ["utt-000", "utt-001", "utt-003"]
    assert shard.skipped == [SkippedUtterance(utterance_id="utt-002", reason=f"utterance utt-002: {reason}")]
    right = label_all(config.model_copy(update={"teachers": config.teachers[:1]}))
    for found, expected in zip(shard.utterances, [right.utterances[row] for row in (0, 1, 3)], strict=True):
        # Two teachers with the same weights are one teacher, up to rounding.
        np.testing.assert_array_equal(found.targets.class_ids, expected.targets.class_ids)
        np.testing.assert_allclose(found.targets.log_probs, expected.targets.log_probs, atol=1e-5)
    with pytest.raises(UtteranceError, match=re.escape(f"utterance utt-002: {reason}")):
        label_all(config, on_error="fail")


def test_a_teacher_that_is_always_wrong(tmp_path: Path) -> None:
    """Every utterance is left out; how many may be is the job's matter."""
    sounds = write_sounds(tmp_path / "sounds", [0.5, 0.5, 0.5])
    teacher = write_linear_teacher(tmp_path / "teacher", num_classes=7)
    config = make_job(sounds.manifest, [teacher], tmp_path / "labels", destination__shard_seconds=60.0)
    shard = label_all(config, on_error="skip")
    assert shard.utterances == []
    assert [entry.utterance_id for entry in shard.skipped] == ["utt-000", "utt-001", "utt-002"]


def test_an_utterance_shorter_than_an_exported_teacher_takes(tmp_path: Path) -> None:
    sounds = write_sounds(tmp_path / "sounds", [0.5, 0.03])
    write_bundle(
        tmp_path / "teacher",
        name="long",
        model=export(eager_model("tdnn"), 40, min_frames=8),
        factory=None,
        arguments={},
        front_end=Fbank(),
        inventory=INVENTORY,
        frame_shift_ms=10.0,
    )
    teacher = TeacherConfig(bundle=str(tmp_path / "teacher"))
    job = {"destination__shard_seconds": 60.0, "resources__batch_seconds": 0.5}
    shard = label_all(make_job(sounds.manifest, [teacher], tmp_path / "labels", **job), on_error="skip")
    assert [labelled.utterance_id for labelled in shard.utterances] == ["utt-000"]
    (entry,) = shard.skipped
    assert entry.reason.startswith(
        "utterance utt-001: teacher 'long' refuses features of shape (1, 3, 40): Guard failed"
    )


def test_a_device_that_fails_is_no_utterances_fault(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="CUDA error"):
        label_all(faulty_job(tmp_path, "device"), on_error="skip")


def test_what_the_teachers_fail_on_alone_is_left_out(tmp_path: Path) -> None:
    config = faulty_job(tmp_path, "raises")
    shard = label_all(config, on_error="skip")
    assert [labelled.utterance_id for labelled in shard.utterances] == ["utt-000", "utt-001", "utt-003"]
    reason = "utterance utt-002: the teachers fail on it: ValueError: the kernel is longer"
    assert shard.skipped == [SkippedUtterance(utterance_id="utt-002", reason=reason)]
    with pytest.raises(UtteranceError, match=f"^{re.escape(reason)}$"):
        label_all(config, on_error="fail")


def test_a_batch_that_does_not_fit_into_memory_is_labelled_an_utterance_at_a_time(tmp_path: Path) -> None:
    together = label_all(faulty_job(tmp_path / "together", "memory"))
    alone = label_all(faulty_job(tmp_path / "alone", "memory", resources__batch_seconds=0.1))
    assert [labelled.utterance_id for labelled in together.utterances] == [f"utt-{row:03d}" for row in range(4)]
    for one, other in zip(together.utterances, alone.utterances, strict=True):
        assert_same_targets(one.targets, other.targets)


def test_an_utterance_that_is_too_long_for_the_memory_is_left_out(tmp_path: Path) -> None:
    """With a reason that is the same on every machine."""
    shard = label_all(faulty_job(tmp_path, "memory alone", seconds=[0.5, 0.4, 0.6, 0.5]), on_error="skip")
    assert [labelled.utterance_id for labelled in shard.utterances] == ["utt-000", "utt-001", "utt-003"]
    reason = "utterance utt-002: memory was not enough for its 0.6 s alone"
    assert shard.skipped == [SkippedUtterance(utterance_id="utt-002", reason=reason)]


def test_memory_that_is_short_at_times_is_no_utterances_fault(tmp_path: Path) -> None:
    config = faulty_job(tmp_path, "memory alone", seconds=[0.5, 0.4, 0.6, 0.7])
    with pytest.raises(
        RuntimeError, match=r"^utterance utt-002: memory was not enough for its 0\.6 s alone, but was for one of 0\.7 s"
    ):
        label_all(config, on_error="skip")


def test_an_utterance_of_another_fold_shows_nothing_of_memory(tmp_path: Path) -> None:
    """Its teachers may be smaller."""
    sounds = write_sounds(tmp_path / "sounds", [0.5, 0.6, 0.7, 0.8], loud=[1])
    # Folds 1, 1, 0, 0.
    rows = [replace(row, speaker="carl" if index < 2 else "anna") for index, row in enumerate(sounds.utterances)]
    sounds = replace(sounds, utterances=tuple(rows)).write()
    factory = {"factory": "tests.support.teachers:faulty_model", "fault": "memory alone", "above": LOUDNESS}
    teachers = [
        write_linear_teacher(
            tmp_path / f"{fold}", held_out=Fold(num_folds=2, fold=fold), **(factory if fold else {})
        ).model_copy(update={"fold": fold})
        for fold in range(2)
    ]
    config = make_job(
        sounds.manifest, teachers, tmp_path / "labels", corpus__num_folds=2, destination__shard_seconds=60.0
    )
    assert [entry.utterance_id for entry in label_all(config, on_error="skip").skipped] == ["utt-001"]


def test_a_batch_that_fails_by_chance_is_tried_again_with_its_shard(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="bad luck"):
        label_all(faulty_job(tmp_path, "chance"), on_error="skip")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs Linux' /proc")
def test_storage_that_fails_is_no_utterances_fault(tmp_path: Path) -> None:
    """A file that is there, but reading it fails."""
    sounds = write_sounds(tmp_path / "sounds", [0.5, 0.5])
    rows = (sounds.utterances[0], replace(sounds.utterances[1], audio="/proc/self/mem"))
    sounds = replace(sounds, utterances=rows).write()
    teacher = write_linear_teacher(tmp_path / "teacher")
    config = make_job(sounds.manifest, [teacher], tmp_path / "labels", destination__shard_seconds=60.0)
    with pytest.raises(OSError, match="Errno"):
        label_all(config, on_error="skip")


def test_teachers_that_pad_differently(tmp_path: Path) -> None:
    """Where they agree on the frames, what follows them does not matter."""
    sounds = write_sounds(tmp_path / "sounds", [0.5, 0.4])
    teachers = [
        write_linear_teacher(tmp_path / "linear"),
        write_linear_teacher(tmp_path / "padding", factory="tests.support.teachers:padding_model"),
    ]
    url = tmp_path / "labels"
    both = label_all(make_job(sounds.manifest, teachers, url, destination__shard_seconds=60.0))
    alone = label_all(make_job(sounds.manifest, teachers[:1], url, destination__shard_seconds=60.0))
    for found, expected in zip(both.utterances, alone.utterances, strict=True):
        np.testing.assert_array_equal(found.targets.class_ids, expected.targets.class_ids)


def test_a_teacher_that_gives_no_frame(tmp_path: Path) -> None:
    """One that joins frames may give none for a very short utterance."""
    sounds = write_sounds(tmp_path / "sounds", [0.5, 0.01])
    sounds = replace(sounds, utterances=tuple(replace(row, hard_labels=None) for row in sounds.utterances)).write()
    teacher = write_linear_teacher(tmp_path / "short", factory="tests.support.teachers:short_model")
    config = make_job(sounds.manifest, [teacher], tmp_path / "labels", destination__shard_seconds=60.0)
    shard = label_all(config, on_error="skip")
    assert [labelled.utterance_id for labelled in shard.utterances] == ["utt-000"]
    assert shard.skipped[0].reason == "utterance utt-001: the teachers give no frames for its 0.01 s"
