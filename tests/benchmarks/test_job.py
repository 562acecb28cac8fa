"""The job benchmark at a small size, without Ray, which ``tests/e2e`` starts."""

from __future__ import annotations

import pytest

from tests.benchmarks.job import figures, padding


def test_figures() -> None:
    found = figures(num_shards=3, shard_seconds=20.0, repeats=1, with_ray=False)
    assert [figure.ratio is None for figure in found[:4]] == [False] * 4
    for figure in found[:4]:
        assert 0.05 < (figure.ratio or 0) < 20


def test_padding() -> None:
    found = padding()
    assert found[0].value == pytest.approx(0.01, abs=0.02)
    assert all(figure.met for figure in found)
