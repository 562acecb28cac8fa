"""The job benchmark at a small size, without Ray, which ``tests/e2e`` starts."""

from __future__ import annotations

import pytest

from tests.benchmarks.job import figures, padding, steady_rate


def test_figures() -> None:
    found = figures(num_shards=3, shard_seconds=20.0, repeats=1, with_ray=False)
    assert [figure.ratio is None for figure in found[:4]] == [False] * 4
    for figure in found[:4]:
        assert 0.05 < (figure.ratio or 0) < 20


def test_rates_leave_out_the_shards_that_ended_first() -> None:
    assert steady_rate([100.0, 50.0, 10.0], {0: 2.0, 1: 3.0, 2: 4.0}) == 30
    assert steady_rate([100.0, 50.0, 10.0], {0: 3.0, 1: 2.0, 2: 4.0}) == 55
    # Two actors in step, each 10 s of speech in a second.
    assert steady_rate([10.0] * 6, {0: 1.0, 1: 1.0, 2: 2.0, 3: 2.0, 4: 3.0, 5: 3.0}, num_actors=2) == 20
    # And half a shard apart.
    assert steady_rate([10.0] * 6, {0: 0.5, 1: 1.0, 2: 1.5, 3: 2.0, 4: 2.5, 5: 3.0}, num_actors=2) == 20


def test_padding() -> None:
    found = padding()
    assert found[0].value == pytest.approx(0.01, abs=0.02)
    assert all(figure.met for figure in found)
