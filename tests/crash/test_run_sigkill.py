"""``teacher-service run`` killed with SIGKILL at random moments, on a Ray cluster that outlives it, and run again.

The job's driver is killed; Ray then ends its actors, which may be in the middle of a shard or still finish one beside the next
run. Each dataset that comes out must be, byte for byte, that of a run nobody disturbed.
"""

from __future__ import annotations

import os
import random
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from softlabel_schemas.dataset import open_dataset, verify
from softlabel_schemas.errors import InputError
from softlabel_schemas.layout import MANIFEST
from tests.support.datasets import SHARD_FORMATS
from tests.support.teachers import job_fields, write_job, write_sounds, write_teacher
from tests.support.trees import tree

NUM_KILLS = 20
# More logical CPUs than there are: a run need not wait until Ray has ended the actors of the one that was killed.
CLUSTER = """
import os, signal, sys
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
import ray
context = ray.init(address="local", num_cpus=64, include_dashboard=False, object_store_memory=100 << 20)
print(context.address_info["gcs_address"], flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Address of a Ray cluster on loopback; drivers join it with the same token."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-c", CLUSTER], text=True, env=ENVIRONMENT, **pipes) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        yield process.stdout.readline().strip()
        process.stdin.close()
        process.wait(60)


# Ray guards a cluster with a token of its own unless one is given.
ENVIRONMENT = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def start_run(job: Path, cluster: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "teacher_service.cli", "run", str(job), "--address", cluster]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)


def run_in_peace(job: Path, cluster: str) -> float:
    started = time.monotonic()
    process = start_run(job, cluster)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return time.monotonic() - started


@pytest.mark.ray
@pytest.mark.timeout(1800)
def test_killed_runs_resume_to_the_same_bytes(tmp_path: Path, cluster: str) -> None:
    sounds = write_sounds(tmp_path / "sounds", [2.0 + 0.1 * index for index in range(40)])
    teachers = [
        # Recurrent ones: they load faster than exported programs, so that more kills land in the work itself.
        write_teacher(tmp_path / "blstm-40", "blstm"),
        write_teacher(tmp_path / "blstm-64", "blstm", num_mel_bins=64),
    ]

    def write(name: str, shard_format: str) -> tuple[Path, Path]:
        changes = {"destination__format": shard_format, "selection__keep_hard_label": True, "resources__num_actors": 2}
        fields = job_fields(sounds.manifest, teachers, tmp_path / name, **changes)
        return write_job(tmp_path / f"{name}.toml", fields), tmp_path / name

    references, jobs, seconds = {}, {}, 0.0
    for shard_format in SHARD_FORMATS:
        job, references[shard_format] = write(f"reference-{shard_format}", shard_format)
        seconds = run_in_peace(job, cluster)
        jobs[shard_format] = write(f"killed-{shard_format}-0", shard_format)
    rng = random.Random(762)
    kills = dict.fromkeys(SHARD_FORMATS, 0)
    while sum(kills.values()) < NUM_KILLS:
        shard_format = rng.choice(SHARD_FORMATS)
        job, folder = jobs[shard_format]
        process = start_run(job, cluster)
        try:
            # The first third is spent on imports and connecting.
            process.wait(rng.uniform(0.3, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            process.kill()
        _, errors = process.communicate()
        if process.returncode == -signal.SIGKILL:
            kills[shard_format] += 1
            if not (folder / MANIFEST).exists():
                with pytest.raises(InputError, match=r"manifest\.json does not exist"):
                    open_dataset(folder)
        else:
            assert process.returncode == 0, errors
        if (folder / MANIFEST).exists():
            assert tree(folder) == tree(references[shard_format])
            jobs[shard_format] = write(f"killed-{shard_format}-{sum(kills.values())}", shard_format)
    for shard_format, (job, folder) in jobs.items():
        run_in_peace(job, cluster)
        assert tree(folder) == tree(references[shard_format])
        assert [problem for _, problem in verify(open_dataset(folder)) if problem] == []
