"""The capture benchmark at a small size."""

from __future__ import annotations

import math

from tests.benchmarks.capture import figures


def test_figures() -> None:
    found = figures(elements=36_000, repeats=2)
    on_cpu = [figure for figure in found if "CPU" in figure.name]
    assert len(on_cpu) == 2 * 2 * 2 * 2
    assert len({figure.name for figure in found}) == len(found) > len(on_cpu)
    for figure in on_cpu:
        assert math.isfinite(figure.value)
        assert figure.ratio is not None
        assert 1e2 < figure.value < 1e9
