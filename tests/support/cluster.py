"""A Ray cluster of several nodes on loopback (``deploy/local/cluster.py``), as tests drive it."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.processes import descendants, title

_SCRIPT = Path(__file__).parents[2] / "deploy" / "local" / "cluster.py"
_ANSWER_SECONDS = 300.0
_END_SECONDS = 60.0


@dataclass(slots=True, kw_only=True)
class RayCluster:
    """
    Attributes:
        session: folder of Ray's logs.
        gcs: address for ``teacher-service run``.
        jobs: address of the Jobs API.
        environment: for whoever joins or submits.
    """

    session: Path
    gcs: str
    jobs: str
    environment: dict[str, str]
    nodes: list[int]
    process: subprocess.Popen[str]

    def command(self, word: str) -> None:
        """``add`` or ``kill``; returns when it is done."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        self.nodes = self._answer()["nodes"]

    def actors(self) -> list[int]:
        """Processes of labelling actors, starting or at work."""
        return sorted(pid for pid in descendants(self.process.pid) if title(pid).startswith("ray::LabellingActor"))

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        # One line for each command, so none waits in Python's buffer.
        if not select.select([self.process.stdout], [], [], _ANSWER_SECONDS)[0]:
            raise TimeoutError(f"the cluster has not answered for {_ANSWER_SECONDS:g} s")
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the cluster ended with {self.process.wait(_END_SECONDS)}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextlib.contextmanager
def ray_cluster(
    log: Path, *, nodes: int = 2, cpus: int = 8, head_cpus: int = 8, variables: Mapping[str, str] | None = None
) -> Iterator[RayCluster]:
    """
    Args:
        log: where Ray's messages go.
        variables: more for the environment of the nodes, and so of the actors.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Ray guards a cluster with a token of its own unless one is given.
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment |= variables or {}
    # A folder of its own: into the shared one, where submitted jobs look for their cluster, any other Ray on the machine writes
    # its address. In /tmp itself: the paths of Ray's sockets may have 107 bytes.
    environment["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    options = [f"--nodes={nodes}", f"--cpus={cpus}", f"--head-cpus={head_cpus}", f"--dashboard-port={port}", "--json"]
    with (
        log.open("w") as errors,
        subprocess.Popen(
            [sys.executable, str(_SCRIPT), *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        ) as process,
    ):
        cluster = RayCluster(
            session=Path(),
            gcs="",
            jobs=f"http://127.0.0.1:{port}",
            environment=environment,
            nodes=[],
            process=process,
        )
        try:
            answer = cluster._answer()
            cluster.gcs, cluster.nodes, cluster.session = answer["gcs"], answer["nodes"], Path(answer["session"])
            environment["RAY_API_SERVER_ADDRESS"] = cluster.jobs
            yield cluster
        finally:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                # Popen would wait for it without a limit.
                for pid in descendants(process.pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                raise
            finally:
                shutil.rmtree(environment["RAY_TMPDIR"], ignore_errors=True)
