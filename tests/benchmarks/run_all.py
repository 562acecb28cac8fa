"""Every benchmark, each in a process of its own, and one table.

    python -m tests.benchmarks.run_all [--json] [--only NAME ...] [--write tests/benchmarks/README.md]

Progress goes to stderr, the table to stdout. Ends with exit code 1 where a benchmark failed, after the others have run; a
target that is not met is no failure.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from tests.benchmarks.figures import Figure, to_json
from tests.benchmarks.table import failure_row, machine, notes, table

NAMES = ("codec", "capture", "job", "workers", "student", "random_access", "scale")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print a JSON array of figures instead of the table")
    parser.add_argument("--only", nargs="+", default=NAMES, metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--write", type=Path, help="put the results of what ran into this Markdown file too")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child is not None:
        (name,) = options.only
        options.child.write_text(to_json(importlib.import_module(f"tests.benchmarks.{name}").figures()), "utf-8")
        return 0
    found: dict[str, list[Figure]] = {}
    failures: dict[str, str] = {}
    for name in options.only:
        started = time.monotonic()
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            found[name] = run(name)
        except RuntimeError as error:
            failures[name] = str(error)
        print(f"{name}: {failures.get(name, 'done')}, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        if options.write is not None and name in found:
            _write(options.write, name, found[name])
    figures = [figure for each in found.values() for figure in each]
    if options.json:
        print(to_json(figures))
    else:
        print("\n".join([table(figures), *(failure_row(name, reason) for name, reason in failures.items())]))
    return 1 if failures else 0


def run(name: str) -> list[Figure]:
    """The figures of one benchmark, from a new Python. Raises RuntimeError where it fails."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        path = Path(folder) / "figures.json"
        command = [sys.executable, "-m", "tests.benchmarks.run_all", "--only", name, "--child", str(path)]
        # What a benchmark prints is progress: the table alone goes to stdout.
        done = subprocess.run(command, stdout=sys.stderr, check=False)
        if done.returncode:
            raise RuntimeError(f"failed with exit code {done.returncode}; the reason is on stderr")
        return read_figures(path.read_text("utf-8"))


def read_figures(text: str) -> list[Figure]:
    """What ``to_json`` wrote."""
    fields = [{name: value for name, value in each.items() if name != "ratio"} for each in json.loads(text)]
    return [Figure(**{**each, "spread": each["spread"] and tuple(each["spread"])}) for each in fields]


def _write(path: Path, name: str, figures: Sequence[Figure]) -> None:
    results = f"{datetime.now(UTC):%Y-%m-%d}, {machine()}.\n\n{table(figures)}\n\n{notes(figures)}"
    path.write_text(with_results(path.read_text("utf-8"), name, results), "utf-8")


def with_results(text: str, name: str, results: str) -> str:
    """``text`` with what stands between the marks of a benchmark replaced. Raises ValueError where the marks are missing."""
    begin, end = f"<!-- results of {name} -->", f"<!-- end of {name} -->"
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"no place for results: expected a line {begin} and, after it, a line {end}")
    return f"{before}{begin}\n\n{results}\n\n{end}{after}"


if __name__ == "__main__":
    sys.exit(main())
