"""Trainings that end within an epoch, as a killed process or a failing store ends them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from student_trainer import train as train_module
from student_trainer.config import TrainConfig

_ROOT = Path(__file__).parents[2]
# Within the second of two epochs, after a checkpoint.
_EPOCH, _STEP = 1, 2
_KILLED = f"""
import os, signal, sys
from student_trainer import cli, train
step = train._Trainer._step
def killed(self, *args):
    if (self.at.epoch, self.at.step) == ({_EPOCH}, {_STEP}):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args)
train._Trainer._step = killed
cli.main(["train", sys.argv[1]])
"""


def train_until_killed(toml: Path) -> None:
    """By SIGKILL, in a process of its own, at the third step of the second epoch."""
    path = os.pathsep.join([str(_ROOT), str(_ROOT / "schemas"), os.environ.get("PYTHONPATH", "")])
    killed = subprocess.run(
        [sys.executable, "-c", _KILLED, str(toml)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr


def train_until_the_store_fails(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """For good, at the third step of the second epoch; a checkpoint is written then."""
    step = train_module._Trainer._step

    def failing(self: Any, *args: Any) -> dict[str, float]:
        if (self.at.epoch, self.at.step) == (_EPOCH, _STEP):
            raise OSError("the store is gone")
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(train_module._Trainer, "_step", failing)
        with pytest.raises(OSError, match="the store is gone"):
            train_module.train(config)
