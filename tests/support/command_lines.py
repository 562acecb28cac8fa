"""What files outside the code say of the product: its command lines, and the versions that belong together."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import click

import softlabel_schemas.cli
import student_trainer.cli
import teacher_service.cli
from softlabel_schemas.version import __version__

ROOT = Path(__file__).parents[2]
COMMANDS: dict[str, click.Group] = {
    "softlabels": softlabel_schemas.cli.main,
    "teacher-service": teacher_service.cli.main,
    "student-trainer": student_trainer.cli.main,
}


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def check_command_line(line: str) -> None:
    """Raises for a command, an option or a number of arguments that the product does not have."""
    name, *arguments = shlex.split(line)
    assert name in pyproject()["project"]["scripts"]
    if arguments == ["--help"]:
        return
    group = COMMANDS[name]
    command_name, command, rest = group.resolve_command(click.Context(group), arguments)
    assert command is not None
    command.make_context(command_name, rest)


def pinned(package: str) -> str:
    """Its version: of the product itself, or of the constraints that images are built with."""
    if package == pyproject()["project"]["name"]:
        return __version__
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    (version,) = re.findall(rf"^{re.escape(package)}==(.+)$", constraints, re.MULTILINE)
    return str(version)
