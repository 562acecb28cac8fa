"""Planning a corpus manifest (``teacher_service.job.prepare``): seconds and memory over utterances.

Manifests are real, of utterances of 10 s; their audio does not exist, since planning reads none.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from softlabel_schemas.corpus_blocks import ManifestFile
from softlabel_schemas.corpus_schema import ROWS_PER_GROUP
from softlabel_schemas.plan import ShardPlanner
from teacher_service.config import TeacherConfig
from teacher_service.job import prepare
from tests.benchmarks.curves import Curve
from tests.benchmarks.figures import Figure, median_and_spread
from tests.benchmarks.fresh_process import Measured, Step, measure
from tests.benchmarks.scale_records import INVENTORY
from tests.support.manifests import SECONDS, write_large_manifest
from tests.support.teachers import make_job, write_linear_teacher

HOURS = 1_000_000
FRAME_SHIFT_MS = 10.0
NUM_FRAMES = round(HOURS * 3600 * 1000 / FRAME_SHIFT_MS)
NUM_SHARDS = 25_000
NUM_UTTERANCES = 500_000_000
_MAX_SECONDS, _MAX_MB = 60.0, 2_000.0


def planning(manifest: str, teacher: dict[str, Any], num_shards: int) -> Step:
    """The step that is measured, in its own process."""
    num_rows = pq.read_metadata(manifest).num_rows
    config = make_job(
        manifest,
        [TeacherConfig(**teacher)],
        f"{manifest}-labels",
        destination__shard_seconds=max(num_rows * SECONDS / num_shards, SECONDS),
    )
    return Step(run=lambda: len(prepare(config).plan), baseline=lambda: _decode(manifest))


def _decode(manifest: str) -> None:
    """What any reader of all rows must do: one thread, no check, nothing kept."""
    for _ in pq.ParquetFile(manifest).iter_batches(ROWS_PER_GROUP, use_threads=False):
        pass


def opening_manifest(manifest: str) -> Step:
    """What an actor does before it reads the rows of a shard: Parquet's footer, which names every column of every row group."""
    return Step(run=lambda: ManifestFile(manifest, {}).num_row_groups, baseline=lambda: None)


def figures(folder: Path, rows: Sequence[int], labelled_rows: Sequence[int], repeats: int) -> list[Figure]:
    """Of manifests without (``rows``) and with hard labels: 30 times the bytes in memory."""
    teacher = write_linear_teacher(folder / "teacher", inventory=INVENTORY, num_classes=INVENTORY.num_classes)
    fields = teacher.model_dump(mode="json")
    return [
        *_figures(folder, fields, rows, repeats, with_labels=False),
        *_figures(folder, fields, labelled_rows, repeats, with_labels=True),
    ]


def _figures(
    folder: Path, teacher: dict[str, Any], rows: Sequence[int], repeats: int, *, with_labels: bool
) -> list[Figure]:
    what = "planning, with hard labels" if with_labels else "planning, without hard labels"
    measured: list[list[Measured]] = []
    for num_rows in rows:
        manifest = write_large_manifest(folder / f"{num_rows}.parquet", num_rows, INVENTORY if with_labels else None)
        arguments = {"manifest": str(manifest), "teacher": teacher, "num_shards": NUM_SHARDS}
        measured.append([measure(planning, **arguments) for _ in range(repeats if num_rows == rows[-1] else 1)])
        manifest.unlink()
    seconds = Curve(
        name=what,
        size_name="utterances",
        unit="s",
        sizes=rows,
        values=[median_and_spread([each.seconds for each in runs])[0] for runs in measured],
    )
    last = measured[-1]
    taken, spread = median_and_spread([each.seconds for each in last])
    decoding = median_and_spread([each.baseline_seconds for each in last])[0]
    peak_mb = max(each.peak_mb for each in last)
    at_scale = seconds.at(NUM_UTTERANCES)
    real, scaled = f"{rows[-1]:,} utterances", f"{NUM_UTTERANCES:,} utterances"
    return [
        Figure(
            name=f"{what}: {real}",
            unit="s",
            value=taken,
            baseline=decoding,
            baseline_name="Parquet decoding alone, one thread",
            target=f"<= {_MAX_SECONDS:g} s",
            met=taken <= _MAX_SECONDS,
            spread=spread,
            note=f"real; {rows[-1] / taken:,.0f} utterances/s, {rows[-1] * SECONDS / 3600:,.0f} h of speech",
        ),
        Figure(
            name=f"{what}: memory, {real}",
            unit="MB",
            value=peak_mb,
            baseline=last[0].idle_mb,
            baseline_name="the imports",
            target=f"<= {_MAX_MB:g} MB",
            met=peak_mb <= _MAX_MB,
            note="real; "
            + "; ".join(
                f"{n:,}: {max(m.peak_mb for m in runs):.0f} MB" for n, runs in zip(rows, measured, strict=True)
            ),
        ),
        seconds.figure("real; the smallest sizes are mostly the constant part" if len(rows) > 2 else "real"),
        Figure(
            name=f"{what}: {scaled}",
            unit="s",
            value=at_scale,
            baseline=decoding * NUM_UTTERANCES / rows[-1],
            baseline_name="Parquet decoding alone, one thread",
            target=f"<= {_MAX_SECONDS:g} s",
            met=at_scale <= _MAX_SECONDS,
            note=f"extrapolated from {real} by the exponent of the last two points",
        ),
    ]


def cut(num_rows: int = NUM_UTTERANCES) -> Figure:
    """The cut itself runs at full size: durations are drawn once, and given again and again."""
    seconds_N = np.random.default_rng(0).uniform(0.4, 2 * HOURS * 3600 / num_rows - 0.4, 1 << 20)
    planner, started = ShardPlanner(HOURS * 3600 / NUM_SHARDS), time.perf_counter()
    for _ in range(-(-num_rows // len(seconds_N))):
        planner.add(seconds_N)
    num_shards, taken = len(planner.plan()), time.perf_counter() - started
    return Figure(
        name=f"cut of {NUM_FRAMES:.2g} frames into shards",
        unit="s",
        value=taken,
        target=f"<= {_MAX_SECONDS:g} s",
        met=taken <= _MAX_SECONDS,
        note=f"real, of synthetic durations: {num_rows:,} utterances, {num_shards:,} shards",
    )


def footer(folder: Path, row_groups: Sequence[int]) -> Figure:
    """Memory of each actor of a job of full size."""
    measured = []
    for num_groups in row_groups:
        manifest = write_large_manifest(folder / f"groups-{num_groups}.parquet", 2 * num_groups, None, rows_per_group=2)
        measured.append(measure(opening_manifest, manifest=str(manifest)))
        assert measured[-1].count == num_groups
        manifest.unlink()
    memory = [each.peak_mb - each.idle_mb for each in measured]
    curve = Curve(
        name="footer of the corpus manifest", size_name="row groups", unit="MB", sizes=row_groups, values=memory
    )
    num_groups = -(-NUM_UTTERANCES // ROWS_PER_GROUP)
    return Figure(
        name=f"footer of the corpus manifest: memory, {num_groups:,} row groups",
        unit="MB",
        value=curve.at(num_groups),
        target=f"<= {_MAX_MB:g} MB",
        met=curve.at(num_groups) <= _MAX_MB,
        note=f"extrapolated from {row_groups[-1]:,}, where it takes {measured[-1].seconds:.2f} s and {memory[-1]:.0f} MB",
    )
