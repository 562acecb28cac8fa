"""``teacher-service run`` as a user starts it, on a Ray of this machine: what it leaves, says and listens on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from softlabel_schemas import InputError, open_dataset
from softlabel_schemas.cli import main as softlabels
from teacher_service.cli import main as teacher_service
from teacher_service.config import TeacherConfig
from teacher_service.job import prepare
from teacher_service.pipeline import label_shard
from teacher_service.teacher import load_teachers
from tests.support.processes import LIMIT_SECONDS, descendants, gone, listening_addresses
from tests.support.teachers import (
    INVENTORY,
    Sounds,
    job_fields,
    make_job,
    write_job,
    write_linear_teacher,
    write_sounds,
)

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
NUM_SHARDS = 30
# A batch takes long enough for a run to be watched, and interrupted, between two shards.
DELAY_SECONDS = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """A corpus of one short utterance per shard, and a teacher for it."""

    folder: Path
    sounds: Sounds
    teacher: TeacherConfig

    def job(self, name: str, manifest: str | None = None, **changes: Any) -> Path:
        """The job file NAME.toml that labels into the folder NAME beside it."""
        changes = {
            "destination__shard_seconds": 0.25,
            "selection": {"policy": "top_k", "k": 4, "keep_hard_label": True},
        } | changes
        fields = job_fields(manifest or self.sounds.manifest, [self.teacher], name, **changes)
        return write_job(self.folder / f"{name}.toml", fields)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    return World(
        folder=folder,
        sounds=write_sounds(folder / "sounds", [0.3] * NUM_SHARDS),
        teacher=write_linear_teacher(folder / "teacher", delay_seconds=DELAY_SECONDS),
    )


@pytest.fixture(autouse=True)
def restored_signals() -> Iterator[None]:
    """Commands that are invoked in this process set a handler."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@dataclass(slots=True, kw_only=True)
class Watched:
    """A command that has ended, and what was seen while it ran."""

    code: int
    stdout: str
    stderr: str
    commits: list[int] = field(default_factory=list)
    statuses: list[dict[str, Any]] = field(default_factory=list)
    listening: set[str] = field(default_factory=set)
    processes: set[int] = field(default_factory=set)


def start(job: Path) -> subprocess.Popen[str]:
    paths = [str(ROOT), str(ROOT / "schemas"), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, "-m", "teacher_service.cli", "run", str(job)],
        # As in a terminal: a group of its own, which Ctrl-C goes to.
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)},
    )


def run(job: Path, *, watch: Callable[[subprocess.Popen[str], Watched], None] | None = None) -> Watched:
    """Run JOB to its end; ``watch`` is called again and again until then."""
    process, watched = start(job), Watched(code=-1, stdout="", stderr="")
    deadline = time.monotonic() + LIMIT_SECONDS
    try:
        while watch is not None and process.poll() is None and time.monotonic() < deadline:
            watch(process, watched)
            time.sleep(0.1)
        watched.stdout, watched.stderr = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    watched.code = process.returncode
    assert "Traceback" not in watched.stdout + watched.stderr, watched.stderr
    return watched


def num_commits(url: Path) -> int:
    return len(list((url / "commits").glob("??????.json")))


def digest_of(url: Path) -> str:
    return open_dataset(url).manifest.content_digest


# The uninterrupted run


@pytest.fixture(scope="module")
def finished(world: World) -> Watched:
    url = world.folder / "parquet"

    def watch(process: subprocess.Popen[str], watched: Watched) -> None:
        watched.listening |= listening_addresses(descendants(process.pid))
        if num_commits(url) and num_commits(url) != (watched.commits or [0])[-1]:
            watched.commits.append(num_commits(url))
            result = CliRunner().invoke(teacher_service, ["status", str(url), "--json"])
            assert result.exit_code == 0
            watched.statuses.append(json.loads(result.stdout))

    return run(world.job("parquet"), watch=watch)


def test_a_run_publishes_what_the_pipeline_makes(world: World, finished: Watched) -> None:
    url = world.folder / "parquet"
    assert finished.code == 0, finished.stderr
    lines = finished.stdout.splitlines()
    assert lines[0].startswith(f"{url}: made {NUM_SHARDS} of {NUM_SHARDS} shards in ")
    assert lines[1:] == [f"content digest {digest_of(url)}"]
    # Without a terminal, a line of progress at the end at least.
    last = finished.stderr.splitlines()[-1]
    assert last.startswith("label: 9/9 s of speech, ")
    assert last.endswith(f"{NUM_SHARDS}/{NUM_SHARDS} shards")
    dataset = open_dataset(url)
    assert [labelled.utterance_id for labelled in dataset] == [row.utterance_id for row in world.sounds.utterances]
    config = make_job(world.sounds.manifest, [world.teacher], url)
    job = prepare(config)
    teachers = load_teachers(job.config, job.document.spec)
    spec, storage = dataset.manifest.spec, dataset.manifest.storage
    expected = label_shard(job.corpus.read(0, 2), teachers, spec, storage)
    for found, own in zip(dataset, expected.utterances, strict=False):
        np.testing.assert_array_equal(found.targets.class_ids, own.targets.class_ids)
        assert found.stats.entropy == pytest.approx(own.stats.entropy, rel=1e-5)


def test_verify_passes(world: World, finished: Watched) -> None:
    result = CliRunner().invoke(softlabels, ["verify", str(world.folder / "parquet")])
    assert result.exit_code == 0, result.output


def test_status_while_it_runs_and_afterwards(world: World, finished: Watched) -> None:
    running = [status for status in finished.statuses if not status["published"]]
    assert len(running) > 2
    missing = [len(status["missing"]) for status in running]
    assert missing == sorted(missing, reverse=True)
    assert 0 < missing[1] < NUM_SHARDS
    assert all(status["shards_per_minute"] > 0 for status in running[2:])
    result = CliRunner().invoke(teacher_service, ["status", str(world.folder / "parquet")])
    assert f"{NUM_SHARDS} of {NUM_SHARDS} shards committed, published" in result.stdout


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux' /proc")
def test_ray_listens_on_loopback_alone(finished: Watched) -> None:
    assert finished.listening, "Ray's GCS listens somewhere"
    assert finished.listening <= {"0100007F", "0" * 24 + "01000000", "0" * 16 + "FFFF0000" + "0100007F"}


def test_running_again_changes_nothing(world: World, finished: Watched) -> None:
    url = world.folder / "parquet"
    before = {path: path.stat().st_mtime_ns for path in url.rglob("*")}
    again = run(world.folder / "parquet.toml")
    assert (again.code, again.stderr) == (0, "")
    assert again.stdout.splitlines() == [
        f"{url}: already complete ({NUM_SHARDS} shards); nothing to do",
        f"content digest {digest_of(url)}",
    ]
    assert {path: path.stat().st_mtime_ns for path in url.rglob("*")} == before


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"targets__temperatures": [1.0, 2.0]}, "temperatures: there [1.0], here [1.0, 2.0]"),
        ({"destination__format": "zarr"}, "shard_format: there 'parquet', here 'zarr'"),
    ],
)
def test_other_settings_for_the_same_destination(
    world: World, finished: Watched, changes: dict[str, Any], line: str
) -> None:
    job = world.job("other", destination__url="parquet", **changes)
    result = CliRunner().invoke(teacher_service, ["run", str(job)])
    assert result.exit_code == 2
    assert result.stderr == (
        f"error: {world.folder}/parquet was started with other settings; use them or another destination:\n  {line}\n"
    )


# Interrupted and resumed


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interrupted_run_is_resumed_to_the_same_labels(world: World, finished: Watched, name: str) -> None:
    """In the other format, so that this also shows that the content digest does not depend on it."""
    url = world.folder / f"zarr-{name}"
    job = world.job(f"zarr-{name}", destination__format="zarr")
    sent = False

    def watch(process: subprocess.Popen[str], watched: Watched) -> None:
        nonlocal sent
        if num_commits(url) >= 3 and not sent:
            watched.processes = descendants(process.pid)
            sent = True
            if name == "SIGINT":
                os.killpg(process.pid, signal.SIGINT)
            else:
                process.send_signal(signal.SIGTERM)

    interrupted = run(job, watch=watch)
    assert sent, interrupted
    assert interrupted.code == 130, interrupted.stderr
    num_done = num_commits(url)
    assert 3 <= num_done < NUM_SHARDS
    message = f"interrupted: {num_done} of {NUM_SHARDS} shards are committed; run again to resume"
    assert message in interrupted.stderr.splitlines()
    assert all(gone(pid) for pid in interrupted.processes), "Ray is left running"
    with pytest.raises(InputError, match="a run was begun there but is not finished"):
        open_dataset(url)
    result = CliRunner().invoke(teacher_service, ["status", str(url)])
    assert f"{num_done} of {NUM_SHARDS} shards committed, not published yet" in result.stdout

    if name == "SIGTERM":
        # Resumed alike; once is enough.
        return
    resumed = run(job)
    assert resumed.code == 0, resumed.stderr
    assert resumed.stdout.startswith(f"{url}: made {NUM_SHARDS - num_done} of {NUM_SHARDS} shards in ")
    assert digest_of(url) == digest_of(world.folder / "parquet")
    assert CliRunner().invoke(softlabels, ["verify", str(url)]).exit_code == 0


# What cannot be done


def test_missing_audio_is_one_message(world: World) -> None:
    sounds = write_sounds(world.folder / "broken", [0.3, 0.3])
    (sounds.folder / "utt-001.wav").unlink()
    result = run(world.job("broken-labels", sounds.manifest, destination__shard_seconds=1.0))
    assert result.code == 2
    assert result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if not line.startswith("label: ")]
    assert errors == ["error: utterance utt-001: utt-001.wav does not exist"]
    assert not (world.folder / "broken-labels" / "manifest.json").exists()


def test_poisoned_utterances_are_recorded_and_the_rest_is_labelled(world: World, finished: Watched) -> None:
    """Unreadable audio, posteriors that are not finite, and hard labels of another inventory: one utterance each."""
    num_loud = 5
    sounds = write_sounds(world.folder / "poisoned", [0.3] * NUM_SHARDS, loud=[num_loud])
    (sounds.folder / "utt-003.wav").write_bytes((sounds.folder / "utt-003.wav").read_bytes()[:2000])
    rows = list(sounds.utterances)
    assert rows[9].hard_labels is not None
    rows[9] = replace(rows[9], hard_labels=np.full_like(rows[9].hard_labels, INVENTORY.num_classes))
    replace(sounds, utterances=tuple(rows)).write()
    # Of ordinary noise the mean log energy is about 11, of the loud one 20.
    teacher = write_linear_teacher(world.folder / "nan-teacher", nan_above=16.0)
    errors = {"on_error": "skip", "max_skipped_fraction": 0.1}
    changes = {"teachers": [teacher.model_dump()], "errors": errors, "destination__shard_seconds": 3.0}
    result = run(world.job("poisoned-labels", sounds.manifest, **changes))
    assert result.code == 0, result.stderr
    assert "3 utterances were skipped, the first: utterance utt-003: " in result.stdout
    dataset = open_dataset(world.folder / "poisoned-labels")
    reasons = {entry.utterance_id: entry.reason for entry in dataset.manifest.skipped}
    assert list(reasons) == ["utt-003", "utt-005", "utt-009"]
    assert str(world.folder) not in "".join(reasons.values())
    assert "not finite" in reasons["utt-005"]
    assert "12" in reasons["utt-009"]
    assert CliRunner().invoke(softlabels, ["verify", str(world.folder / "poisoned-labels")]).exit_code == 0
    # The others have the labels that they have without bad company.
    undisturbed = {row.utterance_id: row.targets for row in open_dataset(world.folder / "parquet")}
    for row in dataset:
        np.testing.assert_array_equal(row.targets.class_ids, undisturbed.pop(row.utterance_id).class_ids)
    assert undisturbed.keys() == reasons.keys()

    failed = run(world.job("poisoned-fail", sounds.manifest, teachers=[teacher.model_dump()]))
    assert failed.code == 2
    assert "hard labels run from" in failed.stderr


def test_more_actors_than_the_machine_has_cores_for(world: World) -> None:
    result = run(world.job("actors", resources__num_actors=10_000, resources__cpus_per_actor=2))
    assert (result.code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: resources: 10000 actors with 2 CPU each need 20000, this machine has ")
    assert len(result.stderr.splitlines()) == 1


def test_an_actor_that_dies_while_it_starts(world: World) -> None:
    dying = write_linear_teacher(world.folder / "dying", factory="tests.support.teachers:dying_model")
    result = run(world.job("dying-labels", teachers=[dying.model_dump()]))
    # Ray writes of its own to stdout here.
    assert result.code == 1
    assert "error: teachers could not be loaded in 4 attempts, the last: the actor died: " in result.stderr


def test_a_job_that_is_not_there(tmp_path: Path) -> None:
    result = CliRunner().invoke(teacher_service, ["run", str(tmp_path / "job.toml")])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"error: {tmp_path}/job.toml does not exist; give the path of a TOML file\n"
