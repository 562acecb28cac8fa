"""``teacher-service audit``: honest labels pass to the bit, those of other teachers and those that were thinned out do not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from softlabel_schemas import LabelledUtterance, SoftTargets, open_dataset
from softlabel_schemas.commit import commit_shard
from softlabel_schemas.manifest import SkippedUtterance
from teacher_service.audit import shards_to_audit
from teacher_service.cli import main
from teacher_service.job import PreparedJob, missing_shards, prepare, publish_job
from teacher_service.pipeline import label_shard
from teacher_service.teacher import load_teachers
from tests.support.teachers import (
    Sounds,
    job_fields,
    make_job,
    write_job,
    write_linear_teacher,
    write_sounds,
)

SECONDS = [0.9, 0.3, 1.5, 0.6, 1.2, 0.4]


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Sounds:
    return write_sounds(tmp_path_factory.mktemp("sounds") / "corpus", SECONDS)


def same(utterance: LabelledUtterance) -> LabelledUtterance:
    return utterance


def publish(
    sounds: Sounds,
    folder: Path,
    *,
    labelled_by: int = 1,
    change: Callable[[LabelledUtterance], LabelledUtterance | SkippedUtterance] = same,
) -> str:
    """A dataset that says it was made by the teacher of seed 1, and its job file ``job.toml``; both in ``folder``."""
    jobs: dict[int, PreparedJob] = {}
    for seed in {1, labelled_by}:
        teacher = write_linear_teacher(folder / f"teacher-{seed}", seed=seed)
        options = {
            "destination__shard_seconds": 1.0,
            "errors__on_error": "skip",
            "errors__max_skipped_fraction": 1.0,
            "targets__temperatures": [1.0, 2.0],
        }
        jobs[seed] = prepare(make_job(sounds.manifest, [teacher], folder / "labels", **options))
        if seed == 1:
            write_job(folder / "job.toml", job_fields(sounds.manifest, [teacher], folder / "labels", **options))
    said, done = jobs[1], jobs[labelled_by]
    teachers = load_teachers(done.config, done.document.spec)
    for shard_range in missing_shards(said):
        rows = done.corpus.read(shard_range.first_row, shard_range.num_rows)
        shard = label_shard(rows, teachers, done.document.spec, done.document.storage)
        changed = [change(utterance) for utterance in shard.utterances]
        utterances = [each for each in changed if isinstance(each, LabelledUtterance)]
        skipped = [each for each in changed if isinstance(each, SkippedUtterance)]
        commit_shard(said.store(), said.document, shard_range, utterances, skipped)
    publish_job(said)
    return str(folder / "labels")


def run_audit(url: str, *args: str) -> Result:
    return CliRunner().invoke(main, ["audit", url, "--job", f"{Path(url).parent}/job.toml", *args])


def test_what_the_teachers_said(sounds: Sounds, tmp_path: Path) -> None:
    url = publish(sounds, tmp_path)
    whole = run_audit(url, "--fraction", "1", "--json")
    assert whole.exit_code == 0, whole.stderr
    facts = json.loads(whole.stdout)
    num_shards = open_dataset(url).num_shards
    assert num_shards > 2
    assert facts["shards"] == list(range(num_shards))
    assert facts["utterances"] == facts["identical_utterances"] == len(SECONDS)
    assert (facts["worst_utterance_kl_nats"], facts["top1_agreement"], facts["entries_shared"]) == (0, 1, 1)
    assert facts["findings"] == []
    one = run_audit(url, "--seed", "3")
    assert one.exit_code == 0
    assert f"1 of {num_shards} shards labelled once more (seed 3)" in one.stdout


def test_labels_of_another_teacher(sounds: Sounds, tmp_path: Path) -> None:
    url = publish(sounds, tmp_path, labelled_by=2)
    result = run_audit(url, "--fraction", "1")
    assert result.exit_code == 1
    assert f"error: {url} is not what the teachers say:" in result.stderr
    assert "nats per frame, at most 0.001 is tolerated" in result.stderr
    assert "frames with the same likeliest class: " in result.stderr


def thinned(keep: Callable[[SoftTargets], np.ndarray]) -> Callable[[LabelledUtterance], LabelledUtterance]:
    return lambda utterance: replace(utterance, targets=utterance.targets.keep(keep(utterance.targets)))


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        # Only the likeliest class is left: with the others as one there is no divergence.
        (
            thinned(lambda t: np.isin(np.arange(t.num_entries), t.offsets[:-1])),
            "entries stored of those made anew: 25.00%",
        ),
        (
            thinned(lambda t: np.repeat(np.arange(t.num_frames) % 2 == 0, t.counts_T)),
            "frames with the same likeliest class",
        ),
        (
            lambda u: SkippedUtterance(utterance_id=u.utterance_id, reason="-") if u.utterance_id == "utt-003" else u,
            "utterances are labelled in one of the two only, the first is utt-003",
        ),
        (
            lambda u: replace(u, targets=u.targets.frames(1, u.targets.num_frames)),
            "frames are stored, the teachers give",
        ),
        (
            lambda u: replace(u, targets=replace(u.targets, tail_mass=u.targets.tail_mass * np.float32([1, 0.8]))),
            "frames with the same tail masses, of those with the same entries: 0.00%, at least 99% are expected",
        ),
    ],
    ids=["thinned", "dropped frames", "skipped", "shortened", "other tails"],
)
def test_what_no_rounding_does(
    sounds: Sounds,
    tmp_path: Path,
    change: Callable[[LabelledUtterance], LabelledUtterance | SkippedUtterance],
    finding: str,
) -> None:
    result = run_audit(publish(sounds, tmp_path, change=change), "--fraction", "1")
    assert result.exit_code == 1
    assert finding in result.stderr


def test_rounding_is_tolerated_as_far_as_is_said(sounds: Sounds, tmp_path: Path) -> None:
    """Posteriors 1% sharper, as of another machine that computes in lower precision; the mass kept is the same."""

    def rounded(utterance: LabelledUtterance) -> LabelledUtterance:
        targets = utterance.targets
        sharper = replace(targets, log_probs=targets.log_probs * np.float32(1.01))
        change_T = np.log(targets.kept_mass_T() / sharper.kept_mass_T())
        log_probs = sharper.log_probs + np.repeat(change_T, targets.counts_T).astype(np.float32)
        return replace(utterance, targets=replace(targets, log_probs=np.minimum(log_probs, 0)))

    url = publish(sounds, tmp_path, change=rounded)
    result = run_audit(url, "--fraction", "1", "--json")
    facts = json.loads(result.stdout)
    assert result.exit_code == 0, result.stderr
    assert 0 < facts["kl_nats"] <= facts["worst_utterance_kl_nats"] < 1e-3
    assert facts["identical_utterances"] == 0
    assert run_audit(url, "--fraction", "1", "--tolerance", "0").exit_code == 1


def test_another_job_is_refused_before_anything_is_labelled(sounds: Sounds, tmp_path: Path) -> None:
    url = publish(sounds, tmp_path)
    job = (tmp_path / "job.toml").read_text()
    (tmp_path / "job.toml").write_text(job.replace("k = 4", "k = 5"))
    result = run_audit(url)
    assert result.exit_code == 2
    assert "was not made by this job; give the job that made it:\n  selection: there" in result.stderr
    (tmp_path / "job.toml").write_text(job.replace("shard_seconds = 1.0", "shard_seconds = 99.0"))
    assert "set destination.shard_seconds as it was" in run_audit(url).stderr


def test_a_job_for_gpus_is_not_audited_without_one(
    sounds: Sounds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = publish(sounds, tmp_path)
    job = (tmp_path / "job.toml").read_text()
    (tmp_path / "job.toml").write_text(job.replace("[resources]", "[resources]\ngpus_per_actor = 0.5"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run_audit(url)
    assert result.exit_code == 2
    assert "error: resources.gpus_per_actor is 0.5: the job labels on GPUs, and torch " in result.stderr


def test_the_draw(sounds: Sounds, tmp_path: Path) -> None:
    dataset = open_dataset(publish(sounds, tmp_path))
    drawn = {tuple(shards_to_audit(dataset, 0.5, seed)) for seed in range(40)}
    assert len(drawn) > 1
    assert {index for shards in drawn for index in shards} == set(range(dataset.num_shards))
    assert all(len(set(shards)) == len(shards) for shards in drawn)
    assert shards_to_audit(dataset, 0.5, 7) == shards_to_audit(dataset, 0.5, 7)
