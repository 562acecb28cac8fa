"""Whole jobs, ``teacher-service run`` on a Ray of this machine, against an S3 server that fails, refuses or fills up.

Each ends verified and with the content digest of a job on a local disk, after what ailed it is over.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from softlabel_schemas import open_dataset, verify
from softlabel_schemas.object_store import ObjectStore
from teacher_service.config import TeacherConfig
from tests.support import processes
from tests.support.datasets import SHARD_FORMATS
from tests.support.fault_proxy import RANDOM_FAULTS, Fault, FaultProxy
from tests.support.rgw import Rgw, s3_environment
from tests.support.teachers import Sounds, job_fields, write_job, write_linear_teacher, write_sounds

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
NUM_SHARDS = 20
# While a job's keys are removed: a call of radosgw-admin takes a second on two idle cores.
_SLOW_SHARD_SECONDS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """A corpus of one short utterance per shard, and the digest of a job on a local disk."""

    folder: Path
    sounds: Sounds
    teacher: TeacherConfig
    digest: str

    def check(self, url: str) -> None:
        dataset = open_dataset(url)
        assert [problem for _, problem in verify(dataset) if problem] == []
        assert dataset.manifest.content_digest == self.digest


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    sounds = write_sounds(folder / "sounds", [0.3] * NUM_SHARDS)
    teacher = write_linear_teacher(folder / "teacher", delay_seconds=0.1)
    alone = World(folder=folder, sounds=sounds, teacher=teacher, digest="")
    code, _, errors = finish(start(alone, str(folder / "alone"), {}))
    assert code == 0, errors
    digest = open_dataset(folder / "alone").manifest.content_digest
    return World(folder=folder, sounds=sounds, teacher=teacher, digest=digest)


@pytest.fixture(scope="module")
def slow(world: World) -> dict[str, Any]:
    """Changes of a job: the same labels from a teacher that takes its time."""
    teacher = write_linear_teacher(world.folder / "slow", delay_seconds=_SLOW_SHARD_SECONDS)
    return {"teachers": [teacher.model_dump(exclude_none=True)]}


@pytest.fixture
def account(rgw: Rgw) -> Iterator[Rgw]:
    """A user whose keys and quota are the test's own, with its keys in the environment."""
    user = rgw.add_user()
    with s3_environment(user.environment()):
        yield user


def start(world: World, url: str, variables: Mapping[str, str], **changes: Any) -> subprocess.Popen[str]:
    changes = {"destination__shard_seconds": 0.25, "resources__num_actors": 2} | changes
    fields = job_fields(world.sounds.manifest, [world.teacher], url, **changes)
    job = write_job(world.folder / "job.toml", fields)
    return subprocess.Popen(
        [sys.executable, "-m", "teacher_service.cli", "run", str(job)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, **variables},
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    code, stdout, stderr = processes.finish(process)
    assert "Traceback" not in stderr, stderr
    return code, stdout, stderr


def wait_for_commits(url: str, number: int, process: subprocess.Popen[str]) -> None:
    store = ObjectStore(url)
    processes.wait_for(lambda: len(store.list("commits")) >= number, process)


@pytest.mark.parametrize("shard_format", SHARD_FORMATS)
def test_five_percent_of_the_requests_fail(account: Rgw, world: World, shard_format: str) -> None:
    url = f"s3://{account.bucket}/flaky"
    with FaultProxy(
        account.endpoint, share=0.05, seed=7, credentials=(account.access_key, account.secret_key)
    ) as proxy:
        process = start(world, url, {"AWS_ENDPOINT_URL": proxy.endpoint}, destination__format=shard_format)
        code, _, errors = finish(process)
        counts = proxy.counts()
    assert code == 0, errors
    world.check(url)
    assert sum(counts.get(fault, 0) for fault in RANDOM_FAULTS) > 0


def test_keys_that_expire_are_taken_up_anew(account: Rgw, world: World, slow: dict[str, Any], tmp_path: Path) -> None:
    """The old keys are removed from the server while the job runs; a file holds the new ones."""
    url, credentials = f"s3://{account.bucket}/rotated", tmp_path / "credentials"

    def write_credentials(user: Rgw) -> None:
        keys = f"aws_access_key_id = {user.access_key}\naws_secret_access_key = {user.secret_key}\n"
        new = credentials.with_suffix(".new")
        new.write_text(f"[default]\n{keys}")
        new.replace(credentials)

    write_credentials(account)
    without_keys = {name: value for name, value in account.environment().items() if "KEY" not in name}
    with s3_environment(without_keys | {"AWS_SHARED_CREDENTIALS_FILE": str(credentials)}):
        process = start(world, url, {}, **slow)
        wait_for_commits(url, 3, process)
        following = account.add_keys()
        write_credentials(following)
        account.remove_keys()
        # The job needs the new ones for what is left.
        assert process.poll() is None, process.communicate()
        assert len(ObjectStore(url).list("commits")) < NUM_SHARDS
        code, _, errors = finish(process)
        assert code == 0, errors
        world.check(url)


def test_keys_that_expire_for_good_end_the_job(account: Rgw, world: World, slow: dict[str, Any]) -> None:
    url = f"s3://{account.bucket}/expired"
    process = start(world, url, {}, **slow)
    wait_for_commits(url, 3, process)
    following = account.add_keys()
    account.remove_keys()
    code, stdout, errors = finish(process)
    assert code != 0
    # To HEAD, which may be the first that is refused, a server gives no reason.
    assert re.search(r"access was refused \((InvalidAccessKeyId|403)\)", errors), errors
    assert "renew" in errors
    for secret in (account.access_key, account.secret_key):
        assert secret not in stdout + errors
    with s3_environment(following.environment()):
        assert 3 <= len(ObjectStore(url).list("commits")) < NUM_SHARDS
        # The same job, so the same teacher.
        code, _, errors = finish(start(world, url, {}, **slow))
        assert code == 0, errors
        world.check(url)


def test_a_destination_that_fills_up(account: Rgw, world: World) -> None:
    url = f"s3://{account.bucket}/full"
    quota = ("--quota-scope", "bucket", "--uid", account.user, "--bucket", account.bucket)
    account.admin("quota", "set", *quota, "--max-objects", "12")
    account.admin("quota", "enable", *quota)
    code, _, errors = finish(start(world, url, {}))
    assert code == 1
    assert "QuotaExceeded" in errors
    assert not ObjectStore(url).exists("manifest.json")
    account.admin("quota", "disable", *quota)
    code, stdout, errors = finish(start(world, url, {}))
    assert code == 0, errors
    assert f"content digest {world.digest}" in stdout
    world.check(url)


def test_a_server_that_ignores_conditions_is_refused_before_anything_is_labelled(rgw: Rgw, world: World) -> None:
    url = f"s3://{rgw.bucket}/unconditional"
    with FaultProxy(rgw.endpoint, credentials=(rgw.access_key, rgw.secret_key)) as proxy:
        proxy.rule(Fault.IGNORED_CONDITION)
        variables = rgw.environment() | {"AWS_ENDPOINT_URL": proxy.endpoint}
        code, stdout, errors = finish(start(world, url, variables))
        assert (code, stdout) == (2, "")
        assert "does not support conditional creation" in errors
        assert "accept_last_writer_wins = true" in errors
        code, _, errors = finish(start(world, url, variables, destination__accept_last_writer_wins=True))
        assert code == 0, errors
    with s3_environment(rgw.environment()):
        world.check(url)


def test_the_store_goes_away_for_a_while(account: Rgw, world: World) -> None:
    """Every request fails for ten seconds: the job waits, and goes on."""
    url = f"s3://{account.bucket}/away"
    with FaultProxy(account.endpoint, seed=7, credentials=(account.access_key, account.secret_key)) as proxy:
        process = start(world, url, {"AWS_ENDPOINT_URL": proxy.endpoint})
        wait_for_commits(url, 3, process)
        proxy.rule(Fault.RESET)
        time.sleep(10.0)
        proxy.clear_rules()
        code, _, errors = finish(process)
        assert proxy.counts()[Fault.RESET] > 0
    assert code == 0, errors
    world.check(url)
