"""A real Ray cluster of two nodes and a real S3 server: submitted jobs, and what happens when parts of it fail.

Each job that ends well is verified, and has the content digest of the same job run on this machine alone.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pytest

from softlabel_schemas import InputError, open_dataset, verify
from softlabel_schemas.object_store import ObjectStore
from teacher_service.config import TeacherConfig
from tests.support.cluster import RayCluster, ray_cluster
from tests.support.processes import LIMIT_SECONDS, descendants, finish, listening_addresses, wait_for
from tests.support.teachers import Sounds, job_fields, write_job, write_linear_teacher, write_sounds

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
NUM_SHARDS = 16
# Of a job that something must happen to while it labels.
_SLOW_SHARD_SECONDS = 0.6
# What hangs or is frozen is given up after so long. Less, and on a busy machine so are honest actors, again and again.
_PATIENCE_SECONDS = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """A corpus of one short utterance per shard, a teacher, a cluster, and the digest of an undisturbed run."""

    folder: Path
    sounds: Sounds
    teacher: TeacherConfig
    cluster: RayCluster
    digest: str

    def job(self, name: str, url: str, **changes: Any) -> Path:
        return make_job_file(self.folder, self.sounds.manifest, self.teacher, name, url, **changes)

    def check(self, url: str) -> None:
        dataset = open_dataset(url)
        assert [problem for _, problem in verify(dataset) if problem] == []
        assert dataset.manifest.content_digest == self.digest


def make_job_file(folder: Path, manifest: str, teacher: TeacherConfig, name: str, url: str, **changes: Any) -> Path:
    changes = {"destination__shard_seconds": 0.25, "resources__num_actors": 2} | changes
    return write_job(folder / f"{name}.toml", job_fields(manifest, [teacher], url, **changes))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, s3: Any) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    sounds = write_sounds(folder / "sounds", [0.3] * NUM_SHARDS)
    teacher = write_linear_teacher(folder / "teacher", delay_seconds=0.1)
    # The teachers' factories lie in tests/.
    paths = [str(ROOT), str(ROOT / "schemas"), os.environ.get("PYTHONPATH", "")]
    variables = {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    with ray_cluster(folder / "cluster.log", nodes=2, cpus=4, head_cpus=1, variables=variables) as cluster:
        job = make_job_file(folder, sounds.manifest, teacher, "alone", str(folder / "alone"))
        alone = start(["run", str(job), "--address", cluster.gcs], cluster)
        code, _, errors = finish(alone)
        assert code == 0, errors
        digest = open_dataset(folder / "alone").manifest.content_digest
        yield World(folder=folder, sounds=sounds, teacher=teacher, cluster=cluster, digest=digest)


@pytest.fixture(scope="module")
def slow(world: World) -> dict[str, Any]:
    """Changes of a job: the same labels from a teacher that takes its time."""
    teacher = write_linear_teacher(world.folder / "slow", delay_seconds=_SLOW_SHARD_SECONDS)
    return {"teachers": [teacher.model_dump(exclude_none=True)]}


def start(
    arguments: list[str], cluster: RayCluster, *, program: list[str] | None = None, stderr: IO[str] | None = None
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*(program or [sys.executable, "-m", "teacher_service.cli"]), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr or subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=cluster.environment,
    )


def num_commits(url: str) -> int:
    return len(ObjectStore(url).list("commits"))


def num_retries(stderr: str) -> int:
    """As the last line of progress has it."""
    counts = re.findall(r"\b(\d+) retries\b", stderr)
    return int(counts[-1]) if counts else 0


def with_patience(**seconds: float) -> list[str]:
    """``teacher-service`` with other limits than the hours that suit real jobs."""
    changes = "; ".join(f"ray_job.{name} = {value}" for name, value in seconds.items())
    code = f"from teacher_service import cli, ray_job; {changes}; cli.main()"
    return [sys.executable, "-c", code]


# Submitted


@pytest.fixture(scope="module")
def stopped_and_resumed(world: World, new_url: Callable[[str], str]) -> dict[str, Any]:
    """A submitted job, stopped when some shards are done, and submitted again."""
    url, code = new_url("s3"), world.folder / "code"
    # The teacher's factory is not on the cluster: the runtime environment brings it.
    code.mkdir()
    (code / "shipped.py").write_text("from tests.support.teachers import linear_model as make\n")
    runtime_env = world.folder / "env.toml"
    runtime_env.write_text('working_dir = "code"\n[env_vars]\nOMP_NUM_THREADS = "1"\n')
    teacher = write_linear_teacher(world.folder / "shipped", factory="shipped:make", delay_seconds=0.1)
    job = world.job("submitted", url, destination__format="zarr", teachers=[teacher.model_dump()])
    submit = ["submit", str(job), "--runtime-env", str(runtime_env)]
    first = start([*submit, "--address", world.cluster.jobs], world.cluster)
    wait_for(lambda: num_commits(url) >= 2, first)
    stop = finish(start(["stop", str(job), "--address", world.cluster.jobs], world.cluster))
    stopped = finish(first)
    left = num_commits(url)
    with pytest.raises(InputError, match="a run was begun there but is not finished"):
        open_dataset(url)
    wait_for_no_actors(world.cluster)
    resumed = finish(start(submit, world.cluster))
    return {"url": url, "stop": stop, "stopped": stopped, "left": left, "resumed": resumed}


def wait_for_no_actors(cluster: RayCluster) -> None:
    """A stopped job leaves no actor behind."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while cluster.actors():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_stopped_job_ends_with_130_and_leaves_what_it_committed(stopped_and_resumed: dict[str, Any]) -> None:
    code, stdout, stderr = stopped_and_resumed["stop"]
    assert (code, stderr) == (0, "")
    assert re.fullmatch(r"stopped raysubmit_\w+\n", stdout)
    code, stdout, stderr = stopped_and_resumed["stopped"]
    assert code == 130, stderr
    assert 2 <= stopped_and_resumed["left"] < NUM_SHARDS
    # The log was followed.
    assert "interrupted: " in stdout


def test_a_submitted_job_resumes_to_the_same_labels(world: World, stopped_and_resumed: dict[str, Any]) -> None:
    code, stdout, stderr = stopped_and_resumed["resumed"]
    assert code == 0, stdout + stderr
    made = NUM_SHARDS - stopped_and_resumed["left"]
    assert f"made {made} of {NUM_SHARDS} shards" in stdout
    assert f"content digest {world.digest}" in stdout
    world.check(stopped_and_resumed["url"])


def test_stopping_what_does_not_run(world: World, new_url: Callable[[str], str]) -> None:
    job = world.job("never", new_url("s3"))
    code, stdout, stderr = finish(start(["stop", str(job)], world.cluster))
    assert (code, stderr) == (0, "")
    assert stdout.startswith("no job submitted by teacher-service for this destination is running")
    assert "'ray job stop'" in stdout


def test_a_submitted_job_that_fails_gives_its_exit_code_and_error(world: World, new_url: Callable[[str], str]) -> None:
    broken = write_sounds(world.folder / "broken", [0.3, 0.3])
    (broken.folder / "utt-000.wav").unlink()
    # With the other utterance in its shard: where none is there, it is tried elsewhere.
    job = make_job_file(
        world.folder, broken.manifest, world.teacher, "broken", new_url("s3"), destination__shard_seconds=1.0
    )
    code, stdout, stderr = finish(start(["submit", str(job)], world.cluster))
    assert code == 2
    assert "error: utterance utt-000: utt-000.wav does not exist" in stdout
    assert "ended with exit code 2" in stderr


def test_ray_job_submit_works_too(world: World, new_url: Callable[[str], str], tmp_path: Path) -> None:
    """The job file in the working directory, started by the command that a terminal would take."""
    url = new_url("s3")
    make_job_file(tmp_path, world.sounds.manifest, world.teacher, "job", url)
    ray = [str(Path(sys.executable).with_name("ray")), "job", "submit"]
    arguments = ["--address", world.cluster.jobs, "--working-dir", str(tmp_path), "--"]
    entrypoint = ["python", "-m", "teacher_service.cli", "run", "job.toml"]
    code, stdout, stderr = finish(start([*arguments, *entrypoint], world.cluster, program=ray))
    assert code == 0, stdout + stderr
    world.check(url)


def test_no_jobs_api_at_the_address(world: World) -> None:
    job = world.job("nowhere", str(world.folder / "nowhere"))
    code, stdout, stderr = finish(start(["submit", str(job), "--address", "http://127.0.0.1:1"], world.cluster))
    assert (code, stdout) == (2, "")
    assert stderr.startswith("error: no Ray Jobs API answers at http://127.0.0.1:1")
    assert "Traceback" not in stderr


def test_a_credential_in_the_runtime_environment_is_refused(world: World, tmp_path: Path) -> None:
    job = world.job("secret", str(world.folder / "secret"))
    (tmp_path / "env.toml").write_text('[env_vars]\nAWS_SECRET_ACCESS_KEY = "planted"\n')
    arguments = ["submit", str(job), "--runtime-env", str(tmp_path / "env.toml")]
    code, stdout, stderr = finish(start(arguments, world.cluster))
    assert (code, stdout) == (2, "")
    assert "env_vars.AWS_SECRET_ACCESS_KEY looks like a credential" in stderr
    assert "planted" not in stderr


def test_no_credential_is_in_any_log_or_object(world: World, stopped_and_resumed: dict[str, Any]) -> None:
    """The keys in the cluster's environment were used for every object written above."""
    secrets = [os.environ["AWS_SECRET_ACCESS_KEY"].encode(), os.environ["AWS_ACCESS_KEY_ID"].encode()]
    store = ObjectStore(stopped_and_resumed["url"])
    names = sorted(store.list(""))
    said = [text.encode() for name in ("stop", "stopped", "resumed") for text in stopped_and_resumed[name][1:]]
    logs = [path for path in (world.cluster.session / "logs").rglob("*") if path.is_file()]
    assert any("job-driver" in path.name for path in logs)
    for where, data in [
        *zip(names, store.read_many(names), strict=True),
        *((f"output {number}", text) for number, text in enumerate(said)),
        *((str(path), path.read_bytes()) for path in [*logs, *world.folder.glob("*.toml")]),
    ]:
        assert not any(secret in data for secret in secrets), where


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux' /proc")
def test_the_cluster_listens_on_loopback_alone(world: World) -> None:
    listening = listening_addresses(descendants(world.cluster.process.pid))
    assert listening, "Ray's GCS listens somewhere"
    assert listening <= {"0100007F", "0" * 24 + "01000000", "0" * 16 + "FFFF0000" + "0100007F"}


# Failures


@pytest.mark.parametrize("what", ["raise", "die", "hang"])
def test_an_actor_that_fails_once(world: World, new_url: Callable[[str], str], what: str, tmp_path: Path) -> None:
    """Its shard is made again; one that hangs is noticed by the lack of progress."""
    odd = write_linear_teacher(
        tmp_path / "teacher",
        factory="tests.support.odd_teachers:odd_once_model",
        marker=str(tmp_path / "marker"),
        what=what,
    )
    url = new_url("s3")
    errors = {"stall_minutes": _PATIENCE_SECONDS / 60} if what == "hang" else {}
    job = world.job(f"odd-{what}", url, teachers=[odd.model_dump()], errors=errors)
    code, _, stderr = finish(start(["run", str(job), "--address", world.cluster.gcs], world.cluster))
    assert code == 0, stderr
    assert (tmp_path / "marker").exists()
    dataset = open_dataset(url)
    assert [problem for _, problem in verify(dataset) if problem] == []
    # Another bundle, hence another fingerprint, but the same weights and so the same labels.
    assert dataset.manifest.content_digest == world.digest
    assert num_retries(stderr) >= 1 if what == "hang" else num_retries(stderr) == 1


def test_a_frozen_actor_is_replaced(world: World, new_url: Callable[[str], str], slow: dict[str, Any]) -> None:
    url = new_url("s3")
    job = world.job("frozen", url, **slow)
    wait_for_no_actors(world.cluster)
    program = with_patience(_FROZEN_SECONDS=_PATIENCE_SECONDS)
    process = start(["run", str(job), "--address", world.cluster.gcs], world.cluster, program=program)
    wait_for(lambda: num_commits(url) >= 1, process)
    # Whatever it does now, it has a shard in work soon: more are still to be made than the other one has taken.
    frozen = world.cluster.actors()[0]
    os.kill(frozen, signal.SIGSTOP)
    try:
        assert num_commits(url) < NUM_SHARDS - 4
        code, _, stderr = finish(process)
    finally:
        # The driver has ended it already, as it should.
        with contextlib.suppress(ProcessLookupError):
            os.kill(frozen, signal.SIGKILL)
    assert code == 0, stderr
    assert num_retries(stderr) >= 1
    world.check(url)


def test_a_job_without_room_waits_for_a_node_and_gives_up_in_time(world: World, new_url: Callable[[str], str]) -> None:
    resources = {"num_actors": 1, "cpus_per_actor": 100}
    job = world.job("no-room", new_url("s3"), resources=resources, errors={"room_minutes": 0.05})
    process = start(["run", str(job), "--address", world.cluster.gcs], world.cluster)
    code, stdout, stderr = finish(process)
    assert (code, stdout) == (1, "")
    assert "no node of the Ray cluster had 100 CPU and 0 GPU free" in stderr


def test_a_job_without_room_goes_on_when_a_node_joins(
    world: World, new_url: Callable[[str], str], tmp_path: Path
) -> None:
    """The only node with room is lost before the job and joins again while it waits."""
    url = new_url("s3")
    job = world.job("joined", url, resources={"num_actors": 1, "cpus_per_actor": 4})
    wait_for_no_actors(world.cluster)
    world.cluster.command("kill")
    said = tmp_path / "stderr"
    try:
        with said.open("w") as stderr:
            process = start(["run", str(job), "--address", world.cluster.gcs], world.cluster, stderr=stderr)
        wait_for(lambda: "waiting for room on the cluster" in said.read_text(), process)
        assert num_commits(url) == 0
        assert world.cluster.actors() == []
    finally:
        world.cluster.command("add")
    code, stdout, _ = finish(process)
    assert code == 0, said.read_text()
    assert f"made {NUM_SHARDS} of {NUM_SHARDS} shards" in stdout
    world.check(url)


def test_two_jobs_race_to_one_destination(world: World, new_url: Callable[[str], str], slow: dict[str, Any]) -> None:
    url = new_url("s3")
    job = world.job("raced", url, destination__format="zarr", **slow)
    racers = [start(["run", str(job), "--address", world.cluster.gcs], world.cluster) for _ in range(2)]
    for code, stdout, stderr in [finish(racer) for racer in racers]:
        assert code == 0, stderr
        # Neither came when the other had done it all.
        assert re.search(rf"made [1-9]\d* of {NUM_SHARDS} shards", stdout)
    world.check(url)
    folders = {name.split("/")[1] for name in ObjectStore(url).list("shards")}
    assert len(folders) == NUM_SHARDS
