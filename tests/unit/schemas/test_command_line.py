"""Exit codes and messages that the three commands share."""

from __future__ import annotations

import click
import pytest

from softlabel_schemas.command_line import CheckFailedError, CommandGroup
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
