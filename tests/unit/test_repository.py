"""What the repository holds: its own text, and the datasets of old formats in ``tests/golden``; no other binary files."""

from __future__ import annotations

import subprocess

import pytest

from tests.support.command_lines import ROOT

TOP = {"teacher_service", "student_trainer", "schemas", "deploy", "tests", "pyproject.toml"}
BESIDE = {"CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "constraints.txt"}


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: there is no list of the files that belong to the repository")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True)
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_the_top_level_is_the_agreed_one(tracked: list[str]) -> None:
    top = {name.split("/", 1)[0] for name in tracked}
    assert {name for name in top if not name.startswith(".")} == TOP | BESIDE


def test_all_files_but_golden_datasets_are_text(tracked: list[str]) -> None:
    others = [name for name in tracked if not name.startswith("tests/golden/")]
    assert len(others) > 100
    assert [name for name in others if b"\0" in (ROOT / name).read_bytes()] == []
