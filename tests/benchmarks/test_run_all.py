"""The table of all benchmarks, and the place where the last results are kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.figures import Figure, to_json
from tests.benchmarks.run_all import NAMES, main, read_figures, with_results
from tests.benchmarks.table import failure_row, machine, notes, number, table

FIGURES = [
    Figure(
        name="read",
        unit="frames/s",
        value=6_400_000.0,
        baseline=950_000.0,
        baseline_name="u16 + fp16",
        target="ratio >= 4",
        met=True,
        spread=(0.9, 1.1),
        note="one | core",
    ),
    Figure(name="size", unit="bytes", value=25.5, target="<= 25", met=False),
    Figure(name="memory", unit="MB", value=0.012345),
]
README = Path(__file__).parent / "README.md"


def test_table() -> None:
    assert table(FIGURES).splitlines()[2:] == [
        "| read | 6,400,000 frames/s (0.90 to 1.10 of it) | 950,000 frames/s (u16 + fp16) | 6.74 | ratio >= 4 | yes |",
        "| size | 25.5 bytes |  |  | <= 25 | **no** |",
        "| memory | 0.01235 MB |  |  |  |  |",
    ]
    assert notes(FIGURES) == "- read: one | core"
    assert failure_row("codec", "failed\nbadly") == "| codec | failed badly | | | | **no** |"
    assert [number(value) for value in (0.000123456, 12.3456, 999.96, 12_345.6)] == [
        "0.0001235",
        "12.35",
        "1000",
        "12,346",
    ]


def test_figures_survive_the_way_from_a_process() -> None:
    assert read_figures(to_json(FIGURES)) == FIGURES


def test_a_benchmark_that_fails_is_a_row_and_the_exit_code(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "no_such_benchmark"]) == 1
    printed = capfd.readouterr()
    assert "| no_such_benchmark | failed with exit code 1; the reason is on stderr | | | | **no** |" in printed.out
    assert "No module named 'tests.benchmarks.no_such_benchmark'" in printed.err


def test_results_replace_those_of_the_same_benchmark() -> None:
    text = "a\n<!-- results of x -->\nold\n<!-- end of x -->\nb\n<!-- results of y -->\n<!-- end of y -->\n"
    once = with_results(text, "x", "new")
    assert once == text.replace("\nold\n", "\n\nnew\n\n")
    assert with_results(once, "x", "new") == once
    with pytest.raises(ValueError, match="expected a line <!-- results of z -->"):
        with_results(text, "z", "new")


def test_the_readme_has_a_place_for_every_benchmark() -> None:
    for name in NAMES:
        with_results(README.read_text("utf-8"), name, "")


def test_machine() -> None:
    assert all(word in machine() for word in ("cores", "Python 3.", "numpy ", "ray "))
