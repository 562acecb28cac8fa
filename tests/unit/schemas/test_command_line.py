"""Exit codes, messages and progress that the three commands share."""

from __future__ import annotations

import re

import click
import pytest

from softlabel_schemas.command_line import CheckFailedError, CommandGroup, progress
from softlabel_schemas.errors import InputError, IntegrityError


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InputError("no such split"), 2, "error: no such split"),
        (IntegrityError("a bit fell over"), 1, "error: a bit fell over"),
        (CheckFailedError("one shard is bad"), 1, "error: one shard is bad"),
        (OSError(28, "No space left on device", "labels"), 2, "No space left on device: 'labels'"),
        (ModuleNotFoundError("No module named 'ray'"), 2, "pip install 'essence-distill[teacher]'"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_are_one_message_and_an_exit_code(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, message: str
) -> None:
    group = CommandGroup("teacher-service", extra="teacher")

    @group.command()
    def run() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        group.main(["run"])
    captured = capsys.readouterr()
    assert ended.value.code == code
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert isinstance(run, click.Command)


def test_progress_says_what_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    """No rate of what was done before it was first looked at."""
    with progress("verify", 1, "shards") as advance:
        advance(1)
    assert capsys.readouterr().err == "verify: 1/1 shards\n"
    with progress("verify", 2, "shards") as advance:
        advance(0)
        advance(2, "the last")
    assert re.fullmatch(r"verify: 2/2 shards, [\d,.]+ shards/s the last\n", capsys.readouterr().err)
