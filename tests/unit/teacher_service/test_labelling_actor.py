"""The actor labels a shard while it commits the one before; errors and receipts stay with their own shard."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from softlabel_schemas import layout
from softlabel_schemas.commit import committed_shards
from softlabel_schemas.errors import InputError
from softlabel_schemas.folds import Fold, fold_of
from softlabel_schemas.utterance_reader import UtteranceError
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


def test_what_this_machine_does_not_see_may_be_seen_by_another(tmp_path: Path) -> None:
    """An InputError would end the job; who prepared it has read both."""
    job = job_of(tmp_path, "labels")
    actor, away = loaded(job), tmp_path / "away"
    manifest = Path(job.corpus.url).rename(away)
    with pytest.raises(OSError, match=r"^on this machine: corpus manifest .* does not exist$"):
        actor.label(job.plan[0])
    away.rename(job.corpus.url)
    actor.label(job.plan[0])
    Path(job.config.teachers[0].bundle).rename(manifest)
    with pytest.raises(OSError, match=r"^on this machine: .* is not a teacher bundle: "):
        loaded(job)


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


@pytest.mark.parametrize("on_error", ["skip", "fail"])
def test_a_machine_that_has_none_of_a_shards_files_commits_nothing(tmp_path: Path, on_error: str) -> None:
    """As one without the mount that they lie on: another may have them, and what is skipped is skipped for good."""
    job = job_of(tmp_path, "labels", errors={"on_error": on_error, "max_skipped_fraction": 1.0})
    for index in (2, 3, 5):
        (tmp_path / "sounds" / f"utt-{index:03d}.wav").unlink()
    actor = loaded(job)
    with pytest.raises(
        OSError,
        match=r"utt-002.wav does not exist, nor do the files of the other 1 utterances of the shard; this machine may",
    ):
        actor.label(job.plan[1])
    if on_error == "skip":
        assert actor.label(job.plan[2]).num_skipped == 1
        assert committed_shards(job.store()) == {2}
    else:
        with pytest.raises(UtteranceError, match=r"^utterance utt-005: utt-005.wav does not exist$"):
            actor.label(job.plan[2])
        assert committed_shards(job.store()) == set()


def failing_job(
    folder: Path,
    seconds: Sequence[float],
    *,
    allowed: float = 1.0,
    fault: str = "raises",
    speakers: Sequence[str] = (),
    last_fails: bool = False,
    shard_seconds: float | None = None,
    on_error: str = "skip",
) -> PreparedJob:
    """The first two utterances are a shard that the teachers fail on. With ``speakers``, one for each utterance, there are two
    folds with a teacher each; ``last_fails``: the last utterance is one that they fail on, too."""
    loud = [0, 1, *([len(seconds) - 1] if last_fails else [])]
    sounds = write_sounds(folder / "sounds", seconds, loud=loud)
    named = zip(sounds.utterances, speakers or [None] * len(seconds), strict=True)
    sounds = replace(sounds, utterances=tuple(replace(row, speaker=speaker) for row, speaker in named)).write()
    teachers = [
        write_linear_teacher(
            folder / f"teacher-{fold}",
            factory="tests.support.teachers:faulty_model",
            held_out=Fold(num_folds=2, fold=fold) if speakers else None,
            fault=fault,
            above=LOUDNESS,
        ).model_copy(update={"fold": fold if speakers else None})
        for fold in range(2 if speakers else 1)
    ]
    return prepare(
        make_job(
            sounds.manifest,
            teachers,
            folder / "labels",
            corpus__num_folds=2 if speakers else None,
            destination__shard_seconds=shard_seconds or seconds[0] + seconds[1],
            errors={"on_error": on_error, "max_skipped_fraction": allowed},
        )
    )


@pytest.mark.parametrize(
    ("fault", "failure"),
    [("raises", "the teachers fail on it: ValueError: .*"), ("not finite", "the teachers' posteriors are not finite")],
)
def test_a_shard_that_the_teachers_fail_on_is_left_out_where_they_are_seen_to_work(
    tmp_path: Path, fault: str, failure: str
) -> None:
    """By an actor that has made no other shard. What is skipped is skipped for good: where the machine lacks a package, or
    memory that something else has taken, none of its shards may be."""
    job = failing_job(tmp_path, [0.5] * 8, allowed=0.25, fault=fault)
    actor = loaded(job)
    model: Any = actor._teachers[0].model
    model.above = -1e9
    for shard_range in job.plan:
        with pytest.raises(
            RuntimeError, match=rf"utterance utt-\d+: {failure}; whether it is at fault or this machine is not"
        ):
            actor.label(shard_range)
    assert committed_shards(job.store()) == set()
    assert actor.beat().idle_seconds == 0.0
    model.above = LOUDNESS
    assert [actor.label(shard_range).num_skipped for shard_range in job.plan] == [2, 0, 0, 0]
    assert actor.beat().seconds_done == pytest.approx(4.0)


@pytest.mark.parametrize("fault", ["raises", "not finite", "memory alone"])
def test_what_a_machine_fails_on_ends_no_job_unless_the_teachers_are_seen_to_work_there(
    tmp_path: Path, fault: str
) -> None:
    """Without "skip", too: only then it is the utterance's own fault."""
    job = failing_job(tmp_path, [0.5] * 2 + [0.4] * 6, fault=fault, on_error="fail")
    actor = loaded(job)
    model: Any = actor._teachers[0].model
    model.above = -1e9
    for shard_range in job.plan:
        with pytest.raises(RuntimeError, match="whether it is at fault or this machine"):
            actor.label(shard_range)
    model.above = LOUDNESS
    with pytest.raises(UtteranceError, match=r"^utterance utt-000: "):
        actor.label(job.plan[0])
    assert actor.label(job.plan[1]).num_skipped == 0
    assert committed_shards(job.store()) == {1}


def test_memory_that_is_short_at_times_ends_no_job(tmp_path: Path) -> None:
    job = failing_job(tmp_path, [0.5, 0.4, 0.6, 0.6], fault="memory alone", shard_seconds=60.0, on_error="fail")
    with pytest.raises(RuntimeError, match=r"but was for one of 0\.6 s: something else takes it at times"):
        loaded(job).label(job.plan[0])


def test_the_teachers_of_another_fold_show_nothing(tmp_path: Path) -> None:
    """A whole fold that one machine fails on is no fault of its utterances."""
    assert [fold_of(name, 2) for name in ("anna", "carl")] == [0, 1]
    speakers = ["carl", "carl", "anna", "anna", "anna", "carl"]
    job = failing_job(tmp_path / "alone", [0.5] * 6, speakers=speakers, last_fails=True)
    actor = loaded(job)
    for shard_range in (job.plan[0], job.plan[2]):
        with pytest.raises(RuntimeError, match="whether it is at fault or this machine"):
            actor.label(shard_range)
    assert actor.label(job.plan[1]).num_skipped == 0
    job = failing_job(tmp_path / "with", [0.5] * 6, speakers=speakers)
    actor = loaded(job)
    assert [actor.label(shard_range).num_skipped for shard_range in job.plan] == [2, 0, 0]


def test_a_fold_that_is_nowhere_else(tmp_path: Path) -> None:
    """The other utterances of the shard must do: on no machine would there be more to see."""
    speakers = ["carl", "carl", "anna", "anna"]
    job = failing_job(tmp_path, [1.0, 1.0, 0.5, 0.5], speakers=speakers, shard_seconds=60.0)
    (shard_range,) = job.plan
    assert loaded(job).label(shard_range).num_skipped == 2


@pytest.mark.parametrize(("seconds", "is_theirs"), [((0.6, 0.6, 0.5, 0.5), True), ((0.6, 0.6, 0.5, 0.7), False)])
def test_memory_that_is_enough_for_longer_utterances_of_other_shards(
    tmp_path: Path, seconds: tuple[float, ...], is_theirs: bool
) -> None:
    job = failing_job(tmp_path, seconds, fault="memory alone")
    actor = loaded(job)
    if is_theirs:
        assert actor.label(job.plan[0]).num_skipped == 2
    else:
        with pytest.raises(RuntimeError, match=r"memory was not enough for its 0\.6 s alone; whether it is at fault"):
            actor.label(job.plan[0])


def test_a_shard_that_leaves_out_more_than_the_job_may_is_not_committed(tmp_path: Path) -> None:
    """Once it is, no run could make it again when what was missing is there."""
    job = failing_job(tmp_path, [0.5] * 8, allowed=0.2)
    actor = loaded(job)
    actor.label(job.plan[1])
    message = (
        r"2 of the 2 utterances of shard 0 cannot be labelled, more than errors\.max_skipped_fraction = 0\.2 allows of all 8; "
        "the first: utterance utt-000: .*; nothing of the shard is stored"
    )
    with pytest.raises(InputError, match=message):
        actor.label(job.plan[0])
    assert committed_shards(job.store()) == {1}
