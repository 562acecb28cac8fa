"""The benchmark of scale at a small size: its figures exist and are plausible. How fast anything was, is not looked at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.benchmarks import fresh_process, scale_epoch, scale_planning, scale_records, scale_shards, scale_workers
from tests.benchmarks.curves import Curve
from tests.benchmarks.figures import Figure
from tests.support.rgw import Rgw

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured on Linux only")


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new Python for each step would take most of the time."""
    for module in (scale_planning, scale_shards):
        monkeypatch.setattr(module, "measure", fresh_process.measure_here)


def by_name(figures: Sequence[Figure]) -> dict[str, Figure]:
    found = {figure.name: figure for figure in figures}
    assert len(found) == len(figures), "two figures of one name"
    assert all(figure.note for figure in figures)
    assert all((figure.met is None) == (not figure.target) for figure in figures)
    return found


@pytest.mark.usefixtures("in_this_process")
def test_planning(tmp_path: Path) -> None:
    figures = by_name(scale_planning.figures(tmp_path, (1_000, 6_000), (500, 1_000), repeats=1))
    for what, last in (("without", 6_000), ("with", 1_000)):
        small = figures[f"planning, {what} hard labels: {last:,} utterances"]
        large = figures[f"planning, {what} hard labels: 500,000,000 utterances"]
        assert small.baseline is not None
        assert 0 < small.baseline < large.value
        assert large.value / small.value >= 0.99 * 5e8 / last
        assert figures[f"planning, {what} hard labels: memory, {last:,} utterances"].value > 50
    assert scale_planning.cut(50_000_000).value > 0
    assert not list(tmp_path.glob("*.parquet")), "manifests are removed"


def test_footer(tmp_path: Path) -> None:
    """In processes of their own: what this one has freed would be used again."""
    figure = scale_planning.footer(tmp_path, (200, 2_000))
    assert 1 < figure.value < 100_000
    assert "extrapolated from 2,000" in figure.note


@pytest.mark.usefixtures("in_this_process")
def test_shards(tmp_path: Path, rgw: Rgw) -> None:
    figures = by_name(scale_shards.figures(tmp_path, rgw, (5, 20), repeats=1))
    for name in (
        "publishing, parquet, disk: 20 shards",
        "publishing, parquet, S3: 20 shards",
        "publishing, zarr, disk: 20 shards",
        "opening, parquet, disk: 20 shards",
        "opening, parquet, S3: 20 shards",
        "opening, zarr, S3: 20 shards",
        "resume decision, parquet, S3: 20 shards",
        "status, parquet, S3: 20 shards",
    ):
        assert figures[name].value > 0
    parquet, zarr = (figures[f"manifest, {name}: 20 shards"].value for name in ("parquet", "zarr"))
    assert 20 * 300 < parquet < zarr < figures["manifest, zarr: 25,000 shards of 40 h"].value
    assert 0.5 < figures["manifest, parquet: growth with shards"].value <= 1


def test_epoch(rgw: Rgw) -> None:
    figures = by_name([*scale_epoch.figures(rgw, num_shards=2), scale_epoch.order_of_epoch((100, 1_000))])
    for shard_format in ("parquet", "zarr"):
        in_order, shuffled = (
            figures[f"{name}, {shard_format}: bytes"] for name in ("epoch in order", "shuffled epoch")
        )
        assert in_order.ratio is not None
        assert shuffled.ratio is not None
        # All that is stored, and the headers.
        assert 1 < in_order.ratio < 2
        assert shuffled.ratio >= in_order.ratio
        assert figures[f"epoch in order, {shard_format}: requests"].value >= 2


def test_workers(tmp_path: Path) -> None:
    figures = by_name(scale_workers.figures(tmp_path, (1, 4)))
    assert 0 < figures["driver's CPU, 4 workers"].value < 1


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_a_curve_finds_its_exponent(exponent: float) -> None:
    sizes = (10, 100, 1_000)
    curve = Curve(name="cost", size_name="shards", unit="s", sizes=sizes, values=[3 * size**exponent for size in sizes])
    assert curve.exponent == pytest.approx(exponent)
    assert curve.at(10_000) == pytest.approx(curve.values[-1] * 10 ** max(1.0, exponent))
    assert curve.figure().met == (exponent <= 1.1)


def test_records_are_those_that_a_real_run_commits(tmp_path: Path) -> None:
    """Publishing checks each, and opening what was published."""
    url = str(tmp_path / "labels")
    job = str(scale_records.write_records(tmp_path / "run", url, 7, "zarr"))
    steps = (scale_records.resuming(job), scale_records.publishing(job), scale_records.opening(url))
    assert [step.run() for step in steps] == [0, 7, 7]
