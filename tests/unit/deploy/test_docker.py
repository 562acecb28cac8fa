"""The images' build files: what they copy, install and start exists, nothing runs as root, everything is pinned."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from dockerfile_parse import DockerfileParser
from ray.autoscaler._private.command_runner import _with_interactive

from tests.support.command_lines import ROOT, check_command_line, pinned, pyproject

IMAGES = ("teacher", "student")
# What Debian's does for a user who is not root.
DEBIANS_PROFILE = """
PATH="/usr/local/bin:/usr/bin:/bin:/usr/local/games:/usr/games"
export PATH
for i in {folder}/*.sh; do
  if [ -r $i ]; then
    . $i
  fi
done
"""
INSTRUCTIONS = {"ARG", "FROM", "ENV", "RUN", "WORKDIR", "COPY", "USER", "CMD", "COMMENT"}


def instructions(image: str, kind: str) -> list[str]:
    structure = DockerfileParser(str(path_of(image))).structure
    return [each["value"] for each in structure if each["instruction"] == kind]


def path_of(image: str) -> Path:
    return ROOT / "deploy" / "docker" / f"{image}.Dockerfile"


def extras(image: str) -> set[str]:
    (found,) = re.findall(r'"\.\[([a-z0-9,]+)\]"', " ".join(instructions(image, "RUN")))
    return set(found.split(","))


def requirements(names: Sequence[str]) -> set[str]:
    """Packages that these extras bring, and the extras that they name."""
    optional, found = pyproject()["project"]["optional-dependencies"], set[str]()
    for name in names:
        for requirement in optional[name]:
            nested = re.fullmatch(r"essence-distill\[([a-z0-9,]+)\]", requirement)
            found |= requirements(nested.group(1).split(",")) if nested else {re.split(r"[<>=\[]", requirement)[0]}
    return found


@pytest.mark.parametrize("image", IMAGES)
def test_every_instruction_is_known(image: str) -> None:
    structure = DockerfileParser(str(path_of(image))).structure
    assert {each["instruction"] for each in structure} <= INSTRUCTIONS
    # Continued lines are one instruction: what a missing backslash splits off would be one of its own.
    assert len(instructions(image, "FROM")) == 2


@pytest.mark.parametrize("image", IMAGES)
def test_what_is_copied_is_there_and_in_the_context(image: str) -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignore
    for value in instructions(image, "COPY"):
        *sources, _ = value.split()
        if sources[0].startswith("--from="):
            assert sources == ["--from=build", "/opt/essence"]
            continue
        for source in sources:
            assert (ROOT / source).exists(), source
            assert f"!{source}" in ignore, source


@pytest.mark.parametrize("image", IMAGES)
def test_extras_entry_point_and_user_exist(image: str) -> None:
    assert extras(image) <= set(pyproject()["project"]["optional-dependencies"])
    (command,) = instructions(image, "CMD")
    check_command_line(shlex.join(json.loads(command)))
    (user,) = instructions(image, "USER")
    created = [run for run in instructions(image, "RUN") if f"useradd --create-home --uid {user} " in run]
    assert user != "0"
    assert len(created) == 1


@pytest.mark.parametrize("image", IMAGES)
def test_everything_is_pinned(image: str) -> None:
    (python, torch) = instructions(image, "ARG")
    assert re.fullmatch(r"PYTHON=3\.\d+\.\d+-slim-[a-z]+", python)
    assert torch == "TORCH=cpu"
    assert instructions(image, "FROM") == ["python:${PYTHON} AS build", "python:${PYTHON}"]
    for run in instructions(image, "RUN"):
        for install in re.findall(r"pip install [^&]*", run):
            assert "--constraint constraints.txt" in install


def test_the_students_image_has_no_teachers_side() -> None:
    assert "ray" in requirements(sorted(extras("teacher")))
    assert "ray" not in requirements(sorted(extras("student")))
    assert not any("teacher_service" in value for value in instructions("student", "COPY"))


def test_the_teachers_image_takes_every_kind_of_teacher() -> None:
    """A job is prepared without transformers too: that it is missing would show on the workers alone."""
    assert {"transformers", "torch", "ray", "s3fs"} <= requirements(sorted(extras("teacher")))


def test_the_teachers_image_has_the_compiler_that_triton_calls() -> None:
    """In its last stage, without which no shard could be labelled on a GPU."""
    stages = path_of("teacher").read_text().split("\nFROM ")
    (packages,) = re.findall(r"apt-get install (.*?)\\\n", stages[-1])
    assert {"gcc", "libc6-dev"} <= set(packages.split())


def test_rays_launcher_finds_what_it_runs_in_the_container(tmp_path: Path) -> None:
    """Its commands go through login shells, which replace ENV's PATH; rsync copies into the container, ssh goes out of it."""
    (packages,) = [run for run in instructions("teacher", "RUN") if "apt-get install" in run]
    assert {"openssh-client", "rsync"} <= set(packages.split())
    assert "--login" in _with_interactive("ray stop")
    (writes,) = [run for run in instructions("teacher", "RUN") if "/etc/profile.d/" in run]
    subprocess.run(["sh", "-c", writes.replace("/etc/profile.d", str(tmp_path))], check=True)
    profile = DEBIANS_PROFILE.format(folder=tmp_path)
    after_login = subprocess.run(["sh", "-c", f'{profile} echo "$PATH"'], capture_output=True, text=True, check=True)
    (path,) = [value.split()[0] for value in instructions("teacher", "ENV") if value.startswith("PATH=")]
    assert path == "PATH=/opt/essence/bin:$PATH"
    assert after_login.stdout.startswith("/opt/essence/bin:/usr/local/bin:")


def test_the_guides_commands_are_the_products() -> None:
    guide = (ROOT / "deploy" / "README.md").read_text(encoding="utf-8")
    builds = re.findall(r"docker build -f (\S+) -t (\S+)(?: --build-arg TORCH=(\w+))? \.", guide)
    assert [(path, torch) for path, _, torch in builds] == [
        (f"deploy/docker/{image}.Dockerfile", torch) for image in IMAGES for torch in ("", "cuda")
    ]
    for path, tag, torch in builds:
        image = Path(path).name.removesuffix(".Dockerfile")
        assert tag == f"essence-{image}:{pinned('essence-distill')}" + ("-cuda" if torch else "")
    for line in re.findall(r"^    (teacher-service .*)$", guide, re.MULTILINE):
        check_command_line(line)
    for path in re.findall(r"`((?:iam|grafana)/[a-z]+\.json)`|(deploy/[a-z]+/\S+)", guide):
        found = (path[0] and f"deploy/{path[0]}") or path[1].rstrip(",`")
        assert (ROOT / found).exists(), found


def test_the_parser_sees_a_broken_file(tmp_path: Path) -> None:
    text = path_of("teacher").read_text().replace("    && /opt/essence/bin/pip", "\n    && /opt/essence/bin/pip", 1)
    text = re.sub(r" \\\n\n", "\n\n", text)
    (tmp_path / "Dockerfile").write_text(text)
    found = {each["instruction"] for each in DockerfileParser(str(tmp_path)).structure}
    assert not found <= INSTRUCTIONS
