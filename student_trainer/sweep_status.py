"""How far a sweep is: runs done, in work and left, epochs per minute, and the time that is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import click
from rich.console import Console

from student_trainer.config import TrainConfig
from student_trainer.run_folder import RUN, RunFolder

_SECONDS_BETWEEN = 10.0


class SweepStatus:
    """One line on stderr: renewed in place on a terminal, printed every ten seconds where it changed elsewhere.

    What runs have done is read from the history in their folders. The time left is that of their epochs still to come, each as
    long as those of its arm so far (of all arms, where that has none), and for every run what the finished ones took besides,
    evaluation above all; shared out among the runs in work.
    """

    def __init__(self, runs: Sequence[TrainConfig]) -> None:
        self._runs = runs
        self._seconds: dict[str, list[float]] = {config.output: _epoch_seconds(config) for config in runs}
        self._epochs_before = self._num_epochs()
        self._done: set[str] = set()
        # Of runs that were begun here: when, and the seconds of each finished one that were not of an epoch.
        self._resumed = {config.output for config in runs if Path(config.output).exists()}
        self._begun: dict[str, float] = {}
        self._besides: list[float] = []
        self._started = time.monotonic()
        self._last_time, self._last_line = -_SECONDS_BETWEEN, ""
        self._stack = ExitStack()
        self._write: Callable[[str], None] = lambda line: click.echo(line, err=True)

    def __enter__(self) -> Self:
        console = Console(stderr=True)
        if console.is_terminal:
            self._write = self._stack.enter_context(console.status("sweep")).update
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def done(self, config: TrainConfig) -> None:
        """Finished or failed: nothing more is expected of it."""
        self._seconds[config.output] = _epoch_seconds(config)
        self._done.add(config.output)
        if config.output in self._begun:
            taken = time.monotonic() - self._begun[config.output]
            self._besides.append(max(taken - sum(self._seconds[config.output]), 0.0))

    def show(self, *, num_slots: int, num_failed: int) -> None:
        now = time.monotonic()
        all_done = len(self._done) == len(self._runs)
        if now - self._last_time < _SECONDS_BETWEEN and not all_done:
            return
        self._last_time = now
        for config in self._left():
            self._seconds[config.output] = _epoch_seconds(config)
            if config.output not in self._resumed and Path(config.output).exists():
                self._begun.setdefault(config.output, now)
        line = self.line(num_slots=num_slots, num_failed=num_failed, seconds=now - self._started)
        if line != self._last_line:
            self._write(line)
        self._last_line = line

    def line(self, *, num_slots: int, num_failed: int, seconds: float) -> str:
        """``num_slots``: 0 where no run can be in work; ``seconds``: since the start."""
        num_left = len(self._left())
        in_work = min(num_left, num_slots)
        waiting = f"{num_left - in_work} waiting" + (" for room on the cluster" if num_left and not num_slots else "")
        parts = [f"sweep: {len(self._done)}/{len(self._runs)} runs done, {in_work} in work, {waiting}"]
        parts += [f"{num_failed} failed"] if num_failed else []
        epochs = self._num_epochs() - self._epochs_before
        if epochs:
            parts.append(f"{60 * epochs / seconds:.1f} epochs/min")
        remaining = self._remaining_seconds()
        if remaining is not None and in_work:
            parts.append(f"{_duration(remaining / in_work)} left")
        return ", ".join(parts)

    def _left(self) -> list[TrainConfig]:
        return [config for config in self._runs if config.output not in self._done]

    def _num_epochs(self) -> int:
        return sum(map(len, self._seconds.values()))

    def _remaining_seconds(self) -> float | None:
        """Of training on one slot; None as long as no epoch is done."""
        by_arm: dict[str, list[float]] = {}
        for config in self._runs:
            by_arm.setdefault(config.name, []).extend(self._seconds[config.output])
        everything = [seconds for of_arm in by_arm.values() for seconds in of_arm]
        if not everything:
            return None
        remaining = len(self._left()) * sum(self._besides) / max(len(self._besides), 1)
        for config in self._left():
            known = by_arm[config.name] or everything
            num_epochs = config.training.epochs - len(self._seconds[config.output])
            remaining += num_epochs * sum(known) / len(known)
        return remaining


def _epoch_seconds(config: TrainConfig) -> list[float]:
    """Seconds of each epoch that the run has trained."""
    if not (Path(config.output) / RUN).exists():
        return []
    return [float(epoch["seconds"]) for epoch in RunFolder(config.output).read_json(RUN)["history"]]


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes} min" if minutes < 100 else f"{minutes / 60:.1f} h"
