"""A job made ready: what does not fit is found before any work, and both values are named."""

from __future__ import annotations

import re
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from softlabel_schemas import ClassInventory, InputError, layout, open_dataset, verify
from softlabel_schemas.bundle import BundleReader
from softlabel_schemas.commit import read_commits, read_manifest
from softlabel_schemas.manifest import SkippedUtterance
from softlabel_schemas.object_store import ObjectStore
from softlabel_schemas.selection import TopK
from softlabel_schemas.shard import LabelledUtterance, UtteranceStats
from teacher_service.config import JobConfig, TeacherConfig
from teacher_service.job import PreparedJob, missing_shards, num_skipped, prepare, publish_job
from tests.support.datasets import commit_rows
from tests.support.manifests import SECONDS as SECONDS_EACH
from tests.support.manifests import write_large_manifest
from tests.support.memory import in_own_process
from tests.support.targets import random_targets
from tests.support.teachers import INVENTORY, LINEAR_FACTORY, Sounds, make_job, write_linear_teacher, write_sounds

OTHER = ClassInventory(names=(*INVENTORY.names[:-1], "other"))
SECONDS = [0.5, 0.4, 0.6, 0.5, 0.7, 0.5]


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Sounds:
    return write_sounds(tmp_path_factory.mktemp("sounds"), SECONDS)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> TeacherConfig:
    return write_linear_teacher(tmp_path_factory.mktemp("bundles") / "linear")


def test_what_a_job_is_a_function_of(sounds: Sounds, teacher: TeacherConfig, tmp_path: Path) -> None:
    heavy = teacher.model_copy(update={"weight": 3.0})
    job = prepare(make_job(sounds.manifest, [teacher, heavy], tmp_path / "labels", destination__shard_seconds=1.0))
    spec, storage = job.document.spec, job.document.storage
    assert [member.weight for member in spec.teachers] == [0.25, 0.75]
    assert {member.digest for member in spec.teachers} == {BundleReader(teacher.bundle).description.digest()}
    assert (spec.num_classes, spec.frame_shift_ms, spec.inventory_digest) == (12, 10.0, INVENTORY.digest())
    assert job.inventory == INVENTORY
    assert [(r.index, r.first_row, r.num_rows) for r in job.plan] == [(0, 0, 3), (1, 3, 1), (2, 4, 2)]
    assert job.seconds_of_shard == pytest.approx([1.5, 0.5, 1.2])
    assert (storage.num_shards, storage.num_rows, storage.shard_format) == (3, 6, "parquet")
    assert not (tmp_path / "labels").exists()
    rows = job.corpus.read(3, 2)
    assert [row.utterance_id for row in rows] == ["utt-003", "utt-004"]


def test_splits_are_selected(sounds: Sounds, teacher: TeacherConfig, tmp_path: Path) -> None:
    job = prepare(make_job(sounds.manifest, [teacher], tmp_path / "labels", corpus__splits=["test"]))
    assert job.document.storage.num_rows == 1
    message = "the corpus has no split dev; it has test, train"
    with pytest.raises(InputError, match=re.escape(message)):
        prepare(make_job(sounds.manifest, [teacher], tmp_path / "labels", corpus__splits=["train", "dev"]))


def test_a_temperature_that_the_codec_cannot_tell(sounds: Sounds, teacher: TeacherConfig, tmp_path: Path) -> None:
    """Beside all twelve classes; beside few, or stored without loss, it is told."""

    def job(k: int, codec: str) -> JobConfig:
        changes = {"targets__temperatures": [1.0, 4.0], "targets__codec": codec}
        return make_job(
            sounds.manifest, [teacher], tmp_path / "labels", selection={"policy": "top_k", "k": k}, **changes
        )

    message = (
        "targets.temperatures: temperature 4 is asked for, but codec 'mtf-sqrt' stores every probability below 6.8e-06 as "
        "1.7e-06; at temperature 4 11 such entries of a frame would weigh 0.036 each"
    )
    with pytest.raises(InputError, match=re.escape(message)):
        prepare(job(12, "mtf-sqrt"))
    for k, codec in ((2, "mtf-sqrt"), (12, "packed-f32")):
        assert prepare(job(k, codec)).document.spec.temperatures == (1.0, 4.0)


def test_what_a_codec_adds_up_to_is_warned_of(
    sounds: Sounds,
    teacher: TeacherConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of twelve classes, as it is of thousands."""
    monkeypatch.setattr("softlabel_schemas.tempering._WARNED_MASS", 1e-6)
    for codec, is_said in (("mtf-sqrt", True), ("packed-f32", False)):
        prepare(make_job(sounds.manifest, [teacher], tmp_path / "labels", targets__codec=codec))
        said = capsys.readouterr().err
        assert said.startswith("warning: selection: codec 'mtf-sqrt' stores every probability below") == is_said


def check_refused(message: str, manifest: str, teachers: Sequence[TeacherConfig], folder: Path) -> None:
    """``message`` is literal text."""
    with pytest.raises(InputError, match=re.escape(message)):
        prepare(make_job(manifest, teachers, folder / "labels"))
    assert not (folder / "labels").exists()


def test_teachers_of_different_inventories(sounds: Sounds, teacher: TeacherConfig, tmp_path: Path) -> None:
    other = write_linear_teacher(tmp_path / "other", inventory=OTHER)
    message = (
        f"class inventories differ: {teacher.bundle} has 12 classes (digest {INVENTORY.digest()[:12]}), "
        f"{other.bundle} has 12 (digest {OTHER.digest()[:12]})"
    )
    check_refused(message, sounds.manifest, [teacher, other], tmp_path)


def test_teachers_of_different_frame_shifts(sounds: Sounds, teacher: TeacherConfig, tmp_path: Path) -> None:
    slow = write_linear_teacher(tmp_path / "slow", frame_shift_ms=12.5)
    message = f"teachers have different frame shifts: {teacher.bundle} 10 ms, {slow.bundle} 12.5 ms"
    check_refused(message, sounds.manifest, [teacher, slow], tmp_path)


def test_hard_labels_of_another_frame_shift(teacher: TeacherConfig, tmp_path: Path) -> None:
    sounds = write_sounds(tmp_path / "sounds", SECONDS).write(hard_label_frame_shift_ms=30.0)
    message = "the teachers' frame shift is 10 ms, the corpus has hard labels every 30 ms"
    check_refused(message, sounds.manifest, [teacher], tmp_path)


def test_hard_labels_of_another_inventory(teacher: TeacherConfig, tmp_path: Path) -> None:
    sounds = write_sounds(tmp_path / "sounds", SECONDS).write(inventory=OTHER)
    message = (
        f"{sounds.manifest}: hard labels are ids of inventory {OTHER.digest()[:12]}, "
        f"but the inventory given is {INVENTORY.digest()[:12]} with 12 classes"
    )
    check_refused(message, sounds.manifest, [teacher], tmp_path)


def test_hard_labels_outside_the_inventory(teacher: TeacherConfig, tmp_path: Path) -> None:
    """The whole corpus is refused before work is paid for, unless single utterances may be left out."""
    sounds = write_sounds(tmp_path / "sounds", SECONDS)
    rows = list(sounds.utterances)
    rows[3] = replace(rows[3], hard_labels=np.array([0, 12], dtype=np.int32))
    sounds = replace(sounds, utterances=tuple(rows)).write()
    message = f"{sounds.manifest}: hard labels run from -1 to 12, expected -1 (none) to 11"
    check_refused(message, sounds.manifest, [teacher], tmp_path)
    job = prepare(make_job(sounds.manifest, [teacher], tmp_path / "labels", errors__on_error="skip"))
    assert job.document.storage.num_rows == len(SECONDS)
    # Rows that are not labelled do not count.
    prepare(make_job(sounds.manifest, [teacher], tmp_path / "labels", corpus__splits=["test"]))


def test_a_destination_in_memory(sounds: Sounds, teacher: TeacherConfig) -> None:
    with pytest.raises(InputError, match="memory:// is not shared between processes; use a folder or an object store"):
        prepare(make_job(sounds.manifest, [teacher], "memory://labels"))


@pytest.mark.parametrize("name", ["teacher.json", "inventory.json"])
def test_a_bundle_without_one_of_its_files(sounds: Sounds, tmp_path: Path, name: str) -> None:
    bundle = write_linear_teacher(tmp_path / "bundle")
    (tmp_path / "bundle" / name).unlink()
    message = f"{tmp_path}/bundle is not a teacher bundle: {tmp_path}/bundle/{name} does not exist"
    check_refused(message, sounds.manifest, [bundle], tmp_path)


def test_a_bundle_that_contradicts_its_inventory(sounds: Sounds, tmp_path: Path) -> None:
    bundle = write_linear_teacher(tmp_path / "bundle")
    (tmp_path / "bundle" / "inventory.json").write_bytes(OTHER.to_json())
    message = (
        f"inventory.json has (digest, classes) ('{OTHER.digest()}', 12), teacher.json says ('{INVENTORY.digest()}', 12)"
    )
    check_refused(message, sounds.manifest, [bundle], tmp_path)


def test_a_corpus_that_is_not_there(teacher: TeacherConfig, tmp_path: Path) -> None:
    check_refused(
        f"corpus manifest {tmp_path}/corpus.parquet does not exist", f"{tmp_path}/corpus.parquet", [teacher], tmp_path
    )


def test_a_factory_that_the_job_does_not_allow(sounds: Sounds, teacher: TeacherConfig, tmp_path: Path) -> None:
    message = f"the model is made by calling {LINEAR_FACTORY}; if you trust it"
    check_refused(message, sounds.manifest, [TeacherConfig(bundle=teacher.bundle)], tmp_path)


# Resuming and publishing


def commit_all(job: PreparedJob, *, num_skipped: int, stop: int | None = None) -> None:
    """Commit the shards before ``stop``, with random targets; the first ``num_skipped`` utterances are skipped."""
    rng = np.random.default_rng(0)
    stats = UtteranceStats(kept_mass=0.5, entropy=1.0, agreement=float("nan"))
    rows: list[LabelledUtterance | SkippedUtterance] = []
    for index in range(len(SECONDS)):
        targets = random_targets(rng, num_frames=5, num_classes=12, max_entries=4, temperatures=(1.0,))
        rows.append(LabelledUtterance(utterance_id=f"utt-{index:03d}", targets=targets, stats=stats))
    rows[:num_skipped] = [
        SkippedUtterance(utterance_id=row.utterance_id, reason="broken") for row in rows[:num_skipped]
    ]
    missing_shards(job)
    for shard_range in job.plan[:stop]:
        commit_rows(job.store(), job.document, shard_range, rows)


def test_missing_shards(sounds: Sounds, teacher: TeacherConfig, tmp_path: Path) -> None:
    config = make_job(sounds.manifest, [teacher], tmp_path / "labels", destination__shard_seconds=1.0)
    job = prepare(config)
    assert missing_shards(job) == job.plan
    commit_all(job, num_skipped=0, stop=2)
    assert missing_shards(job) == job.plan[2:]
    with pytest.raises(InputError, match="1 of 3 shards are not committed, the first is shard 2"):
        publish_job(job)
    other = prepare(config.model_copy(update={"selection": TopK(k=5)}))
    with pytest.raises(
        InputError, match=r"was started with other settings(.|\n)*selection: there .*'k': 4.*, here .*'k': 5"
    ):
        missing_shards(other)


@pytest.mark.parametrize("allowed", [0.0, 0.33, 0.34])
def test_publishing_allows_a_share_of_skipped_utterances(
    sounds: Sounds, teacher: TeacherConfig, tmp_path: Path, allowed: float
) -> None:
    """Two of six."""
    errors = {"on_error": "skip", "max_skipped_fraction": allowed}
    job = prepare(make_job(sounds.manifest, [teacher], tmp_path / "labels", errors=errors))
    commit_all(job, num_skipped=2)
    if allowed == 0.34:
        assert publish_job(job).num_skipped == 2
        assert [entry.utterance_id for entry in read_manifest(job.store()).skipped] == ["utt-000", "utt-001"]
        return
    message = f"2 of 6 utterances could not be labelled, more than errors.max_skipped_fraction = {allowed:g} allows"
    with pytest.raises(InputError, match=re.escape(message)):
        publish_job(job)
    assert not (tmp_path / "labels" / "manifest.json").exists()


def test_a_job_that_would_fail_goes_on_as_one_that_skips(
    sounds: Sounds, teacher: TeacherConfig, tmp_path: Path
) -> None:
    """An utterance that cannot be labelled is found when shards are made. What is published is as verification finds it."""
    url = tmp_path / "labels"
    strict = prepare(make_job(sounds.manifest, [teacher], url, destination__shard_seconds=1.0))
    assert strict.document.storage.on_error == "fail"
    assert len(missing_shards(strict)) == 3
    errors = {"on_error": "skip", "max_skipped_fraction": 0.5}
    lenient = prepare(make_job(sounds.manifest, [teacher], url, destination__shard_seconds=1.0, errors=errors))
    commit_all(lenient, num_skipped=2)
    assert publish_job(lenient).num_skipped == 2
    dataset = open_dataset(url)
    assert dataset.manifest.storage.on_error == "fail"
    assert [problem for _, problem in verify(dataset) if problem] == []
    # All else is as it was begun.
    other = prepare(make_job(sounds.manifest, [teacher], url, destination__shard_seconds=0.6, errors=errors))
    with pytest.raises(InputError, match=r"other settings.*:\n  num_shards: .*\n  shard_seconds: there 1.0, here 0.6$"):
        missing_shards(other)


def test_what_was_skipped_before_counts(sounds: Sounds, teacher: TeacherConfig, tmp_path: Path) -> None:
    """A job that was stopped for too many is not given as many again."""
    jobs = [
        prepare(
            make_job(
                sounds.manifest,
                [teacher],
                tmp_path / "labels",
                destination__shard_seconds=1.0,
                errors={"on_error": "skip", "max_skipped_fraction": allowed},
            )
        )
        for allowed in (0.5, 0.3)
    ]
    commit_all(jobs[0], num_skipped=2, stop=2)
    missing = missing_shards(jobs[0])
    assert [shard_range.index for shard_range in missing] == [2]
    assert num_skipped(jobs[0], missing) == 2
    with pytest.raises(InputError, match=r"2 of 6 utterances could not be labelled, more than errors.max_skipped_"):
        num_skipped(jobs[1], missing)


def test_a_job_that_would_fail_does_not_publish_what_was_skipped(
    sounds: Sounds, teacher: TeacherConfig, tmp_path: Path
) -> None:
    """By a run before it that skips. Without their records the shards are made again."""
    url = tmp_path / "labels"
    errors = {"on_error": "skip", "max_skipped_fraction": 0.5}
    lenient = prepare(make_job(sounds.manifest, [teacher], url, destination__shard_seconds=1.0, errors=errors))
    commit_all(lenient, num_skipped=2)
    strict = prepare(make_job(sounds.manifest, [teacher], url, destination__shard_seconds=1.0))
    message = (
        r'2 of 6 utterances could not be labelled, more than errors\.on_error = "fail" allows; .*remove the records'
    )
    with pytest.raises(InputError, match=message):
        num_skipped(strict, missing_shards(strict))
    with pytest.raises(InputError, match=message):
        publish_job(strict)
    for record in read_commits(strict.store(), strict.document, range(3)):
        if record.shard.skipped:
            (url / layout.commit_record(record.shard.index)).unlink()
    assert missing_shards(strict) == strict.plan[:1]
    commit_all(strict, num_skipped=0)
    assert publish_job(strict).num_skipped == 0
    assert [problem for _, problem in verify(open_dataset(url)) if problem] == []


def test_what_is_published_stays(sounds: Sounds, teacher: TeacherConfig, tmp_path: Path) -> None:
    """Whatever a job allows that comes later."""
    url = tmp_path / "labels"
    errors = {"on_error": "skip", "max_skipped_fraction": 0.5}
    lenient = prepare(make_job(sounds.manifest, [teacher], url, destination__shard_seconds=1.0, errors=errors))
    commit_all(lenient, num_skipped=2)
    published = publish_job(lenient)
    assert publish_job(prepare(make_job(sounds.manifest, [teacher], url, destination__shard_seconds=1.0))) == published


def test_a_manifest_has_room_for_all_that_may_be_skipped(
    sounds: Sounds, teacher: TeacherConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("teacher_service.job.MAX_DOCUMENT_BYTES", 1500)

    def prepared(**errors: Any) -> PreparedJob:
        return prepare(make_job(sounds.manifest, [teacher], tmp_path / "labels", errors=errors))

    prepared(on_error="fail", max_skipped_fraction=0.5)
    prepared(on_error="skip", max_skipped_fraction=0.3)
    with pytest.raises(InputError, match=r"2 shards and 3 skipped utterances may need .* errors\.max_skipped_fraction"):
        prepared(on_error="skip", max_skipped_fraction=0.5)


def test_publishing_reads_each_commit_record_once(
    sounds: Sounds, teacher: TeacherConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = {"on_error": "skip", "max_skipped_fraction": 0.5}
    job = prepare(make_job(sounds.manifest, [teacher], tmp_path / "labels", errors=errors))
    commit_all(job, num_skipped=2)
    read, found = ObjectStore.read, list[str]()

    def reading(store: ObjectStore, key: str, **kwargs: Any) -> bytes:
        found.append(key)
        return read(store, key, **kwargs)

    monkeypatch.setattr(ObjectStore, "read", reading)
    publish_job(job)
    commits = sorted(key for key in found if key.startswith("commits/"))
    assert commits == [f"commits/{index:06d}.json" for index in range(len(job.plan))]


def test_a_store_without_conditional_writes_is_accepted_by_the_job(
    sounds: Sounds, teacher: TeacherConfig, tmp_path: Path
) -> None:
    for accepted in (False, True):
        job = prepare(
            make_job(
                sounds.manifest,
                [teacher],
                tmp_path / "labels",
                destination__storage_options={"auto_mkdir": True},
                destination__accept_last_writer_wins=accepted,
            )
        )
        remote = job.config.destination.model_copy(update={"url": f"memory://{tmp_path.name}", "storage_options": {}})
        job = replace(job, config=job.config.model_copy(update={"destination": remote}))
        assert job.store().last_writer_wins is accepted


# Memory


def test_a_prepared_job_does_not_grow_with_the_corpus(tmp_path: Path, teacher: TeacherConfig) -> None:
    """What is held after the same number of shards is planned for a corpus and for one eight times as large."""
    held = []
    for num_rows in (4_096, 32_768):
        manifest = write_large_manifest(tmp_path / f"{num_rows}.parquet", num_rows, INVENTORY)
        config = make_job(
            str(manifest), [teacher], tmp_path / "labels", destination__shard_seconds=num_rows * SECONDS_EACH / 512
        )
        num_bytes, num_shards, last_id = in_own_process(held_by_job, config, num_rows - 1)
        held.append(num_bytes)
        assert num_shards == 512
        assert last_id.endswith(f"{num_rows - 1:08d}")
    # Seven more blocks of the manifest, of about 300 bytes each. Its ids alone would take a megabyte.
    assert held[1] < held[0] + 20_000


def held_by_job(config: JobConfig, last_row: int) -> tuple[int, int, str]:
    """Bytes, shards, and the last utterance's id; for a process of its own."""
    prepare(config)
    tracemalloc.start()
    before = pa.total_allocated_bytes()
    job = prepare(config)
    held = tracemalloc.get_traced_memory()[0] + pa.total_allocated_bytes() - before
    return held, len(job.plan), job.corpus.read(last_row, 1)[0].utterance_id


# Size


def test_a_shard_that_its_format_cannot_hold(
    sounds: Sounds, teacher: TeacherConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All twelve classes of the longest shard's 150 frames: 7,200 bytes of log-probabilities without loss, 900 of positions."""
    monkeypatch.setattr("teacher_service.job.PARQUET_STREAM_BYTES", 7_200)

    def job(codec: str = "packed-f32", shard_format: str = "parquet", **selection: Any) -> JobConfig:
        changes = {"destination__shard_seconds": 1.0, "destination__format": shard_format, "targets__codec": codec}
        selection = {"policy": "top_k", "k": 20, **selection}
        return make_job(sounds.manifest, [teacher], tmp_path / "labels", selection=selection, **changes)

    message = (
        r"the longest shard, of 1.5 s, would have a stream of .* at 12 entries a frame with the codec packed-f32, expected .*; "
        r"set destination\.shard_seconds below 1\.5, or a smaller selection\.k"
    )
    with pytest.raises(InputError, match=message):
        prepare(job())
    for other in (
        job(k=11),
        job(codec="mtf-sqrt"),
        job(shard_format="zarr"),
        # How many frames are dropped is not known before.
        job(frames={"uncertain": 0.0, "min_top1": 0.9}),
    ):
        prepare(other)
    monkeypatch.setattr("teacher_service.job.MAX_DECODED_BYTES", 7_200)
    with pytest.raises(InputError, match="the longest shard"):
        prepare(job(shard_format="zarr"))
