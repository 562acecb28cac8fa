"""The student's benchmark at its smallest: every figure is there and is of the right kind. Never how fast."""

from __future__ import annotations

import math

import torch

from tests.benchmarks.student import VARIANTS, figures


def test_every_figure() -> None:
    num_threads = torch.get_num_threads()
    try:
        found = figures(
            classes=(30,),
            students=("small",),
            batch_seconds=4.0,
            repeats=2,
            corpus_seconds=16.0,
            pool_seconds=40.0,
        )
    finally:
        torch.set_num_threads(num_threads)
    names = [figure.name for figure in found]
    assert names[: len(VARIANTS)] == [f"step, small student, V=30, {name}" for name in VARIANTS]
    assert len(names) == len(set(names)) == len(VARIANTS) + 7
    for figure in found:
        assert math.isfinite(figure.value), figure.name
        assert figure.value > 0, figure.name
        assert figure.baseline is None or figure.baseline > 0, figure.name
        if figure.unit == "share":
            assert figure.value <= 1, figure.name
    assert [figure.unit for figure in found[-7:]] == ["share"] * 3 + ["s", "s", "s of speech/s", "MB"]
    # A process with torch has more than that to itself.
    assert found[-1].value > 50
