"""The table of figures, in Markdown, and the machine that they are of."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from tests.benchmarks.figures import Figure

_HEAD = "| figure | value | baseline | ratio | target | met |\n|---|---|---|---|---|---|"
_PACKAGES = ("torch", "numpy", "numba", "pyarrow", "zarr", "ray")
_MET = {True: "yes", False: "**no**", None: ""}


def table(figures: Sequence[Figure]) -> str:
    """A row for each figure."""
    return "\n".join([_HEAD, *(_row(figure) for figure in figures)])


def failure_row(name: str, reason: str) -> str:
    """A row for a benchmark without figures."""
    return f"| {name} | {_cell(reason)} | | | | **no** |"


def notes(figures: Sequence[Figure]) -> str:
    """What is to be known of the figures, a line for each that has a note."""
    return "\n".join(f"- {figure.name}: {figure.note}" for figure in figures if figure.note)


def _row(figure: Figure) -> str:
    baseline = "" if figure.baseline is None else f"{number(figure.baseline)} {figure.unit} ({figure.baseline_name})"
    ratio = "" if figure.ratio is None else f"{figure.ratio:.3g}"
    value = f"{number(figure.value)} {figure.unit}"
    if figure.spread is not None:
        value += f" ({figure.spread[0]:.2f} to {figure.spread[1]:.2f} of it)"
    cells = (figure.name, value, baseline, ratio, figure.target, _MET[figure.met])
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())


def number(value: float) -> str:
    """Four digits that count, and every digit of what is large: 0.01234, 12.34, 12,345,678."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def machine() -> str:
    """Processor, cores, system, Python and the packages that speed depends on, in one line."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    packages = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    return f"{model}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}, {packages}"
