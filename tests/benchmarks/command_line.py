"""What all benchmarks' command lines share: options, and figures as a table or as JSON."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from tests.benchmarks.figures import Figure, to_json
from tests.benchmarks.table import notes, table


def benchmark_parser(description: str | None, *, repeats: int | None = None) -> argparse.ArgumentParser:
    """With ``--json``, and ``--repeats`` where there is a default for it."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    if repeats is not None:
        parser.add_argument("--repeats", type=int, default=repeats, help="of each measurement")
    return parser


def print_figures(figures: Sequence[Figure], *, as_json: bool) -> None:
    print(to_json(figures) if as_json else f"{table(figures)}\n\n{notes(figures)}".rstrip())
