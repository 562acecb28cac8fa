"""A recipe that is stopped: its commands end first, each in its own way, and none begins."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import recipe

from tests.support.processes import LIMIT_SECONDS

# Takes longer to save than Python itself waits for a child after Ctrl-C.
COMMAND = """
import pathlib, signal, sys, time
def save(number, frame):
    time.sleep(0.5)
    pathlib.Path(sys.argv[1] + ".saved").touch()
    sys.exit(1)
signal.signal(signal.SIGINT, save)
signal.signal(signal.SIGTERM, save)
pathlib.Path(sys.argv[1] + ".begun").touch()
time.sleep(60)
"""
# As a terminal begins it, however the tests were begun.
RECIPE = f"""
import signal, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from recipe import Workspace, stop_with_commands
signal.signal(signal.SIGINT, signal.default_int_handler)
stop_with_commands()
workspace = Workspace(Path())
with ThreadPoolExecutor(2) as pool:
    list(pool.map(lambda name: workspace.command(Path(sys.executable).name, "-c", {COMMAND!r}, name), "abc"))
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_recipe_ends_after_its_commands_have_saved(tmp_path: Path, how: signal.Signals) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(recipe.__file__).parent)}
    process = subprocess.Popen([sys.executable, "-c", RECIPE], cwd=tmp_path, env=environment, start_new_session=True)
    try:
        while not all((tmp_path / f"{name}.begun").exists() for name in "ab"):
            assert process.poll() is None
            time.sleep(0.02)
        if how == signal.SIGINT:
            os.killpg(process.pid, how)  # as a terminal does
        else:
            process.send_signal(how)
        assert process.wait(LIMIT_SECONDS) == 128 + how
    finally:
        process.kill()
    assert {path.name for path in tmp_path.iterdir()} == {"a.begun", "a.saved", "b.begun", "b.saved"}
