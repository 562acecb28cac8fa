"""The main job as a list of commands: teachers -> soft labels -> students -> report.

Each step writes a TOML file and runs one of the three commands on it, so that what a recipe does can be read, copied and
changed. Commands resume or pass over what is done; so does a recipe.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import NoReturn

import click

COMMANDS = Path(sys.executable).parent
# Commands at work, and whether they are to end.
_running: set[subprocess.Popen[bytes]] = set()
_stopping = threading.Event()


class RecipeError(click.ClickException):
    """A command of the recipe failed; what is done stays done."""


def stop_with_commands() -> None:
    """From now on Ctrl-C and SIGTERM end the commands at work, each in its own way, and then the recipe. A terminal sends
    Ctrl-C to the commands as well; SIGTERM is passed on."""

    def stop(number: int, _frame: FrameType | None) -> NoReturn:
        _stopping.set()
        if number == signal.SIGTERM:
            for process in tuple(_running):
                process.terminate()
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, stop)


def inline(value: object) -> str:
    """A TOML value: text, number, truth value, list or table, of one line."""
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{key} = {inline(inner)}' for key, inner in value.items())} }}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(inline, value))}]"
    return json.dumps(value)


@dataclass(frozen=True)
class Workspace:
    """The folder in which the commands of a recipe run."""

    folder: Path

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text, encoding="utf-8")

    def exists(self, name: str) -> bool:
        return (self.folder / name).exists()

    def command(self, *words: str) -> None:
        click.secho(f"$ {' '.join(words)}", bold=True)
        process = subprocess.Popen([COMMANDS / words[0], *words[1:]], cwd=self.folder)
        _running.add(process)
        # Another thread's command may begin while the signal's handler goes through them.
        if _stopping.is_set():
            process.terminate()
        try:
            with process:
                process.wait()
        finally:
            _running.remove(process)
        if process.returncode:
            raise RecipeError(f"'{' '.join(words)}' ended with exit code {process.returncode}")


@dataclass(frozen=True, kw_only=True)
class Model:
    """``[model]`` of a TRAIN.toml."""

    architecture: str
    arguments: dict[str, int | float] = field(default_factory=dict)

    def toml(self) -> str:
        return f'[model]\narchitecture = "{self.architecture}"\narguments = {inline(self.arguments)}\n'


@dataclass(frozen=True, kw_only=True)
class Teacher:
    name: str
    model: Model


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train the student; ``soft_labels`` is the body of its [soft_labels] table, less the URL."""

    name: str
    model: Model
    soft_labels: str | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The main job on the corpus that lies in ``workspace``.

    Attributes:
        selection: body of the job's [selection] table.
        training: body of every run's [training] table: equal budgets for every arm.
        shard_seconds: of the stored dataset.
        num_parallel: trainings at a time; each with one thread uses two cores better than one with two.
    """

    workspace: Workspace
    teachers: tuple[Teacher, ...]
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    selection: str
    teacher_training: str
    student_training: str
    shard_seconds: float
    num_parallel: int = 2

    def run(self) -> None:
        started = time.monotonic()
        teachers = self.make_labels()
        with ThreadPoolExecutor(self.num_parallel) as pool:
            runs = list(pool.map(self._make_student, [(arm, seed) for seed in self.seeds for arm in self.arms]))
        self.workspace.command(
            "student-trainer", "compare", *teachers, *runs,
            "--evaluation", "ensemble-test.json", "--dataset", "labels-train", "--split", "test", "--report", "report.html",
        )  # fmt: skip
        click.echo(
            f"done in {time.monotonic() - started:.0f} s; report: {(self.workspace.folder / 'report.html').resolve()}"
        )

    def make_labels(self) -> list[str]:
        """Teachers, their soft labels of train and test, and the ensemble's evaluation; returns the teachers' runs."""
        with ThreadPoolExecutor(self.num_parallel) as pool:
            teachers = list(pool.map(self._make_teacher, self.teachers))
        for split in ("train", "test"):
            self.workspace.write(f"label-{split}.toml", self._job(split))
            self.workspace.command("teacher-service", "run", f"label-{split}.toml")
        self.workspace.command("softlabels", "verify", "labels-train")
        self.workspace.command("softlabels", "describe", "labels-train")
        if not self.workspace.exists("ensemble-test.json"):
            test = ("--corpus", "corpus.parquet", "--split", "test", "--output", "ensemble-test.json")
            self.workspace.command("student-trainer", "evaluate", "--dataset", "labels-test", *test)
        return teachers

    def _make_teacher(self, teacher: Teacher) -> str:
        run = self._train(teacher.name, teacher.model, 0, self.teacher_training, None)
        if not self.workspace.exists(f"bundles/{teacher.name}/teacher.json"):
            self.workspace.command("student-trainer", "export", run, f"bundles/{teacher.name}")
        self._evaluate(run)
        return run

    def _make_student(self, arm_and_seed: tuple[Arm, int]) -> str:
        arm, seed = arm_and_seed
        name = f"{arm.name}-{seed}"
        run = self._train(name, arm.model, seed, self.student_training, arm.soft_labels, arm.name)
        self._evaluate(run)
        return run

    def _train(
        self, name: str, model: Model, seed: int, training: str, soft: str | None, arm: str | None = None
    ) -> str:
        soft_labels = f'[soft_labels]\nurl = "labels-train"\n{soft}\n' if soft else ""
        self.workspace.write(
            f"{name}.toml",
            f'name = "{arm or name}"\noutput = "runs/{name}"\nseed = {seed}\n\n'
            '[corpus]\nmanifest = "corpus.parquet"\ninventory = "inventory.json"\n\n'
            f'{soft_labels}[front_end]\nkind = "fbank"\nnum_mel_bins = 40\nstack = 3\n\n'
            f"{model.toml()}\n[training]\n{training}\n",
        )
        self.workspace.command("student-trainer", "train", f"{name}.toml")
        return f"runs/{name}"

    def _evaluate(self, run: str) -> None:
        if not self.workspace.exists(f"{run}/evaluation-test.json"):
            self.workspace.command("student-trainer", "evaluate", run, "--corpus", "corpus.parquet", "--split", "test")

    def _job(self, split: str) -> str:
        teachers = "".join(f'[[teachers]]\nbundle = "bundles/{teacher.name}"\n\n' for teacher in self.teachers)
        return (
            f'[corpus]\nmanifest = "corpus.parquet"\nsplits = ["{split}"]\n\n{teachers}'
            f'[combination]\nmethod = "arithmetic"\n\n[selection]\n{self.selection}\n'
            f'[destination]\nurl = "labels-{split}"\nshard_seconds = {self.shard_seconds}\n\n[resources]\nnum_actors = 2\n'
        )
