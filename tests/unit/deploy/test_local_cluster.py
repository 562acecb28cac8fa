"""The tests' cluster: one that hangs is not waited for."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support import cluster


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux' /proc")
def test_a_cluster_that_never_answers_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "hangs.py"
    script.write_text(
        "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'import time; time.sleep(300)'])\n"
    )
    monkeypatch.setattr(cluster, "_SCRIPT", script)
    monkeypatch.setattr(cluster, "_ANSWER_SECONDS", 1.0)
    monkeypatch.setattr(cluster, "_END_SECONDS", 0.1)
    with (
        pytest.raises(subprocess.TimeoutExpired) as caught,
        cluster.ray_cluster(tmp_path / "log"),
    ):
        raise AssertionError("it has not answered")
    context = caught.value.__context__
    assert isinstance(context, TimeoutError)
    assert "the cluster has not answered for 1 s" in str(context)
