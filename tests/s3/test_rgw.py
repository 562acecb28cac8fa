"""The S3 server as a command that a person runs: what it prints works, and nothing outlives it."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from softlabel_schemas.object_store import ObjectStore
from tests.support.rgw import Rgw, s3_environment

ROOT = Path(__file__).parents[2]
DAEMONS = {"ceph-mon", "ceph-osd", "radosgw"}


@pytest.fixture
def command(rgw: Rgw, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Beside the session's own server, so the two have nothing in common."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.rgw", str(tmp_path / "server")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        yield process
        process.kill()


def read_exports(process: subprocess.Popen[str]) -> dict[str, str]:
    assert process.stdout is not None
    exports: dict[str, str] = {}
    while "SOFTLABELS_TEST_BUCKET" not in exports:
        line = process.stdout.readline()
        assert line, "it ended before it was ready"
        if match := re.match(r"export (\w+)=(.*)\n", line):
            exports[match[1]] = match[2]
    return exports


def children(process: subprocess.Popen[str]) -> dict[str, int]:
    """Its daemons by name, with a descriptor that refers to the process even after its end."""
    pids = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return {Path(f"/proc/{pid}/comm").read_text().strip(): os.pidfd_open(int(pid)) for pid in pids}


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_the_command(command: subprocess.Popen[str], how: signal.Signals) -> None:
    exports = read_exports(command)
    bucket = exports.pop("SOFTLABELS_TEST_BUCKET")
    with s3_environment(exports):
        store = ObjectStore(f"s3://{bucket}/labels")
        assert store.put_if_absent("a", b"data")
        assert store.read("a") == b"data"
    daemons = children(command)
    assert daemons.keys() == DAEMONS
    command.send_signal(how)
    assert command.wait() == (-how if how is signal.SIGKILL else 0)
    for name, descriptor in daemons.items():
        # The descriptor of a process is readable once it has ended.
        assert select.select([descriptor], [], [], 60)[0], f"{name} outlived the command"
        os.close(descriptor)
