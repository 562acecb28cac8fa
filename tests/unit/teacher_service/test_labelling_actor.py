"""The actor labels a shard while it commits the one before; errors and receipts stay with their own shard."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from softlabel_schemas import layout
from softlabel_schemas.commit import committed_shards
from softlabel_schemas.errors import InputError
from teacher_service.job import PreparedJob, missing_shards, prepare
from teacher_service.labelling_actor import LabellingActor
from tests.support.teachers import LOUDNESS, make_job, write_linear_teacher, write_sounds
from tests.support.trees import tree


def job_of(folder: Path, name: str, **changes: Any) -> PreparedJob:
    sounds = write_sounds(folder / "sounds", [0.5] * 8)
    teacher = write_linear_teacher(folder / "teacher", delay_seconds=0.02)
    return prepare(make_job(sounds.manifest, [teacher], folder / name, destination__shard_seconds=1.0, **changes))


def loaded(job: PreparedJob) -> LabellingActor:
    missing_shards(job)
    actor = LabellingActor(job)
    actor.load()
    return actor


def test_shards_made_by_two_threads_have_the_bytes_of_one(tmp_path: Path) -> None:
    one, two = job_of(tmp_path, "one"), job_of(tmp_path, "two")
    actor = loaded(one)
    for shard_range in one.plan:
        actor.label(shard_range)
    actor = loaded(two)
    with ThreadPoolExecutor(2) as pool:
        receipts = list(pool.map(actor.label, two.plan))
    assert len(receipts) == len(two.plan) == 4
    assert committed_shards(two.store()) == {0, 1, 2, 3}
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


@pytest.mark.parametrize(("precision", "told"), [("bfloat16", True), ("float32", False)])
def test_a_slow_precision_is_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    precision: str,
    told: bool,
) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    loaded(job_of(tmp_path, "labels", resources__precision=precision))
    assert ('resources.precision is "bfloat16", without instructions for it here' in caplog.text) == told


def test_the_next_shard_is_labelled_while_one_is_committed(tmp_path: Path) -> None:
    """The first commit only goes on once the second shard has been labelled."""
    job = job_of(tmp_path, "labels")
    actor = loaded(job)
    second_labelled = threading.Event()
    store, put_many = actor._store, actor._store.put_many
    puts: list[int] = []

    def wait_and_put(objects: Any) -> None:
        puts.append(1)
        if len(puts) == 1:
            assert second_labelled.wait(30)
        else:
            second_labelled.set()
        put_many(objects)

    store.put_many = wait_and_put  # type: ignore[method-assign]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(actor.label, job.plan[:2]))
    assert committed_shards(job.store()) == {0, 1}
    assert actor.beat().idle_seconds == 0.0
    assert actor.beat().seconds_done == pytest.approx(2.0)


def test_an_error_is_that_of_its_own_shard(tmp_path: Path) -> None:
    job = job_of(tmp_path, "labels")
    (tmp_path / "sounds" / "utt-004.wav").unlink()
    actor = loaded(job)
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(actor.label, shard_range) for shard_range in job.plan]
    assert [future.exception() is None for future in futures] == [True, True, False, True]
    with pytest.raises(InputError, match="utt-004"):
        futures[2].result()
    assert committed_shards(job.store()) == {0, 1, 3}
    assert actor.beat().idle_seconds == 0.0


def test_a_commit_that_fails_fails_its_shard_alone(tmp_path: Path) -> None:
    """The shard in the other thread is labelled and committed. What was labelled in vain does not count as done."""
    job = job_of(tmp_path, "labels")
    actor = loaded(job)
    (tmp_path / "labels" / layout.commit_record(1)).mkdir(parents=True)
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(actor.label, shard_range) for shard_range in job.plan]
    assert [future.exception() is None for future in futures] == [True, False, True, True]
    assert isinstance(futures[1].exception(), OSError)
    assert actor.beat().seconds_done == pytest.approx(3.0)
    (tmp_path / "labels" / layout.commit_record(1)).rmdir()
    actor.label(job.plan[1])
    assert actor.beat().seconds_done == pytest.approx(4.0)


def test_a_commit_that_is_stuck_shows_while_other_shards_get_on(tmp_path: Path) -> None:
    job = job_of(tmp_path, "labels")
    actor = loaded(job)
    stuck, released, put_many = threading.Event(), threading.Event(), actor._store.put_many

    def wait_and_put(objects: Any) -> None:
        if not stuck.is_set():
            stuck.set()
            assert released.wait(30)
        put_many(objects)

    actor._store.put_many = wait_and_put  # type: ignore[method-assign]
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(actor.label, job.plan[0])
        assert stuck.wait(30)
        since = time.monotonic()
        for shard_range in job.plan[1:]:
            actor.label(shard_range)
        assert actor.beat().idle_seconds >= time.monotonic() - since - 0.01
        released.set()
        first.result()
    assert actor.beat().idle_seconds == 0.0
    assert committed_shards(job.store()) == {0, 1, 2, 3}


def test_a_machine_that_does_not_see_the_run(tmp_path: Path) -> None:
    """Its disk is not the driver's: what it commits there would be missed once all is made."""
    job = job_of(tmp_path, "labels")
    with pytest.raises(OSError, match=r"the run that was begun at .*labels cannot be seen from this machine"):
        LabellingActor(job).load()
    loaded(job)


def test_a_machine_that_has_none_of_a_shards_files_commits_nothing(tmp_path: Path) -> None:
    """As one without the mount that they lie on: another may have them, and what is skipped is skipped for good."""
    job = job_of(tmp_path, "labels", errors={"on_error": "skip", "max_skipped_fraction": 1.0})
    for index in (2, 3, 5):
        (tmp_path / "sounds" / f"utt-{index:03d}.wav").unlink()
    actor = loaded(job)
    with pytest.raises(
        OSError,
        match=r"utt-002.wav does not exist, nor do the files of the other 1 utterances of the shard; this machine may",
    ):
        actor.label(job.plan[1])
    assert actor.label(job.plan[2]).num_skipped == 1
    assert committed_shards(job.store()) == {2}


def failing_job(folder: Path, allowed: float) -> PreparedJob:
    """Four shards of two utterances; the teacher fails on those of the first."""
    sounds = write_sounds(folder / "sounds", [0.5] * 8, loud=[0, 1])
    factory = "tests.support.teachers:faulty_model"
    teacher = write_linear_teacher(folder / "teacher", factory=factory, fault="raises", above=LOUDNESS)
    errors = {"on_error": "skip", "max_skipped_fraction": allowed}
    return prepare(
        make_job(sounds.manifest, [teacher], folder / "labels", destination__shard_seconds=1.0, errors=errors)
    )


def test_a_shard_that_the_teachers_fail_on_is_left_out_where_they_are_seen_to_work(tmp_path: Path) -> None:
    """What is skipped is skipped for good. Before, the machine may lack a package, or memory that something else has taken."""
    job = failing_job(tmp_path, allowed=0.25)
    actor = loaded(job)
    failure = r"utterance utt-000: the teachers fail on it: ValueError: .*; nor could any other of the 2 utterances"
    with pytest.raises(RuntimeError, match=failure):
        actor.label(job.plan[0])
    assert actor.label(job.plan[1]).num_skipped == 0
    model: Any = actor._teachers[0].model
    # As where the machine's trouble comes later.
    model.above = -1e9
    for shard_range in (job.plan[0], job.plan[2]):
        with pytest.raises(RuntimeError, match="the teachers fail on it"):
            actor.label(shard_range)
    assert committed_shards(job.store()) == {1}
    assert actor.beat().idle_seconds == 0.0
    model.above = LOUDNESS
    assert actor.label(job.plan[2]).num_skipped == 0
    assert actor.label(job.plan[0]).num_skipped == 2
    assert committed_shards(job.store()) == {0, 1, 2}


def test_a_shard_that_leaves_out_more_than_the_job_may_is_not_committed(tmp_path: Path) -> None:
    """Once it is, no run could make it again when what was missing is there."""
    job = failing_job(tmp_path, allowed=0.2)
    actor = loaded(job)
    actor.label(job.plan[1])
    message = (
        r"2 of the 2 utterances of shard 0 cannot be labelled, more than errors\.max_skipped_fraction = 0\.2 allows of all 8; "
        "the first: utterance utt-000: .*; nothing of the shard is stored"
    )
    with pytest.raises(InputError, match=message):
        actor.label(job.plan[0])
    assert committed_shards(job.store()) == {1}
