"""The short profile of ``make storm``: real runs of both formats, disturbed by SIGKILL until five have landed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NUM_KILLS = 5


@pytest.mark.ray
@pytest.mark.timeout(1800)
def test_no_frame_is_lost_doubled_or_changed() -> None:
    command = [sys.executable, "-m", "tests.storm", "--kills", str(NUM_KILLS), "--seed", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["kills"] == sum(result["by_kind"].values()) == NUM_KILLS
    assert sum(result["by_phase"].values()) == NUM_KILLS
    # Four runs in five are left alone until they label.
    assert result["by_phase"]["while_labelling"] > 0
    assert result["datasets"] > 0
    assert result["frames"] == result["expected_frames"] > 0
    assert (result["lost"], result["duplicated"], result["corrupted"], result["failed_runs"]) == (0, 0, 0, 0)
    assert result["digests_equal"]
    assert result["objects_equal"]
