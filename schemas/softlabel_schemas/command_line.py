"""What the three commands share: errors as one message and an exit code, and progress.

Exit codes: 0 done; 1 a check failed or stored bytes are damaged; 2 what was asked cannot be done; 130 interrupted.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, Protocol

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from softlabel_schemas.errors import InputError, IntegrityError

# A log file wants a line now and then, not a bar.
_SECONDS_BETWEEN_LINES = 10.0
_RATE_SECONDS = 60.0


class CheckFailedError(Exception):
    """A check that a command was asked for did not hold."""


@contextlib.contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Raises InputError that names the extra of the distribution where a package is missing within."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise InputError(f"{error}; this needs: pip install 'essence-distill[{extra}]'") from None


class CommandGroup(click.Group):
    """A click group whose commands end with one message on stderr instead of a traceback.

    Args:
        extra: the extra of the distribution that the commands need.
    """

    def __init__(self, *args: Any, extra: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._extra = extra

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().main(*args, **kwargs)
        except (IntegrityError, CheckFailedError) as error:
            code, message = 1, str(error)
        except InputError as error:
            code, message = 2, str(error)
        except ModuleNotFoundError as error:
            extra = f"[{self._extra}]" if self._extra else ""
            code, message = 2, f"{error}; this command needs: pip install 'essence-distill{extra}'"
        except OSError as error:
            code, message = 2, f"{type(error).__name__}: {error}"
        except KeyboardInterrupt:
            code, message = 130, "interrupted"
        click.echo(f"error: {message}", err=True)
        sys.exit(code)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            # click would turn it into "Aborted!" with exit code 1, which means a failed check here.
            click.echo("interrupted", err=True)
            sys.exit(130)


class FloatRange(click.FloatRange):
    """click's, without NaN, which is neither below a range nor above it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value} is not a number.", param, ctx)
        return number


class Advance(Protocol):
    def __call__(self, done: float, note: str = "") -> None:
        """``done``: units finished in all; ``note``: shown beside the bar."""


class _Rate:
    """Units per second over the last minute: loading before the first unit, or a pause, is soon forgotten."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, float]] = deque()

    def __call__(self, done: float) -> float:
        now = time.monotonic()
        self._seen.append((now, done))
        while len(self._seen) > 2 and now - self._seen[0][0] > _RATE_SECONDS:
            self._seen.popleft()
        then, before = self._seen[0]
        return (done - before) / max(now - then, 1e-9)


@contextlib.contextmanager
def progress(description: str, total: float, unit: str) -> Iterator[Advance]:
    """Progress on stderr with rate and remaining time: a bar on a terminal, a line every ten seconds elsewhere."""
    console, rate = Console(stderr=True), _Rate()
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as bar:
            task = bar.add_task(description, total=total, note="")
            yield lambda done, note="": bar.update(
                task, completed=done, note=f"{_per_second(rate(done), unit)} {note}".strip()
            )
        return
    last_time, last_line = time.monotonic(), ""

    def print_line(done: float, note: str = "") -> None:
        nonlocal last_time, last_line
        per_second, now = rate(done), time.monotonic()
        if now - last_time < _SECONDS_BETWEEN_LINES and done < total:
            return
        remaining = f"{(total - done) / per_second:,.0f} s left" if per_second > 0 and done < total else ""
        done_of_total = f"{description}: {done:,.0f}/{total:,.0f} {unit}"
        if f"{done_of_total} {note}" != last_line:
            known = "".join(f", {part}" for part in (_per_second(per_second, unit), remaining) if part)
            click.echo(f"{done_of_total}{known} {note}".rstrip(), err=True)
        last_time, last_line = now, f"{done_of_total} {note}"

    yield print_line


def _per_second(rate: float, unit: str) -> str:
    """Empty where it is not known: of what was done before it was first looked at."""
    return f"{rate:,.1f} {unit}/s" if rate > 0 else ""
