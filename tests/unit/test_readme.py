"""The README's examples: job and training files load, command lines parse, the Python example runs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

import softlabel_schemas.cli
import student_trainer.cli
import teacher_service.cli
from student_trainer.config import load_config
from student_trainer.sweep_config import load_sweep
from teacher_service.config import load_job
from tests.support.datasets import write_dataset

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
COMMANDS: dict[str, click.Group] = {
    "softlabels": softlabel_schemas.cli.main,
    "teacher-service": teacher_service.cli.main,
    "student-trainer": student_trainer.cli.main,
}
LINES = [
    # A name holds a "#" too.
    line.split(" #")[0].strip()
    for line in README.splitlines()
    if line.startswith("    ") and line.split()[0] in COMMANDS and not line.strip().endswith("/")
]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_job_and_training_files_load(tmp_path: Path) -> None:
    job, training, sweep = blocks("toml")
    (tmp_path / "job.toml").write_text(job, encoding="utf-8")
    (tmp_path / "student.toml").write_text(training, encoding="utf-8")
    assert len(load_job(tmp_path / "job.toml").teachers) == 2
    assert load_config(tmp_path / "student.toml").soft_labels is not None
    (tmp_path / "sweep.toml").write_text(sweep, encoding="utf-8")
    assert len(load_sweep(tmp_path / "sweep.toml").runs) == 11


@pytest.mark.parametrize("line", LINES)
def test_command_lines_parse(line: str) -> None:
    name, *arguments = shlex.split(line)
    group = COMMANDS[name]
    # With the group's own settings: a command keeps the names of its help option from the first time.
    context = click.Context(group, **group.context_settings)
    command_name, command, rest = group.resolve_command(context, arguments)
    assert command is not None
    command.make_context(command_name, rest, parent=context)


def test_there_are_command_lines_for_every_command() -> None:
    assert {line.split()[0] for line in LINES} == set(COMMANDS)


def test_the_first_python_example_runs(tmp_path: Path) -> None:
    write_dataset(str(tmp_path / "labels-train"), shard_format="parquet")
    example, _ = blocks("python")
    finished = subprocess.run(
        [sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert "utt-" in finished.stdout
