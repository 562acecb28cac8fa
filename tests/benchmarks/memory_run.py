"""Memory of a real run as a curve over its shards: the driver with 25,000 shards planned, and actors that make 1,000 of them.

    python -m tests.benchmarks.memory_run [--planned 25000] [--made 1000] [--format parquet]

The other shards were committed beforehand, with labels of one frame each, so that the driver plans, resumes and publishes at
full size. Prints a table of private memory (MiB) against shards made, then one JSON line: the driver's highest value, and by
how much each actor grew from the second tenth of its shards to the last.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np

from softlabel_schemas import load_corpus
from softlabel_schemas.corpus import write_corpus
from softlabel_schemas.shard import LabelledUtterance, UtteranceStats
from teacher_service.job import missing_shards, prepare
from tests.support.datasets import commit_rows
from tests.support.processes import descendants, resident_bytes, title
from tests.support.targets import random_targets
from tests.support.teachers import INVENTORY, job_fields, make_job, write_job, write_linear_teacher, write_sounds

_UTTERANCES_PER_SHARD = 6
_SECONDS = 10.0
_MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory of a real run as a curve over its shards.")
    parser.add_argument("--planned", type=int, default=25_000)
    parser.add_argument("--made", type=int, default=1_000)
    parser.add_argument("--format", choices=("parquet", "zarr"), default="parquet")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="memory-run-") as name:
        folder = Path(name)
        job = _write(folder, arguments.planned, arguments.made, arguments.format)
        curve = _watch(job, folder / "labels", arguments.planned - arguments.made)
    print(f"{'shards made':>12} {'driver MiB':>11} {'actors MiB':>20}")
    step = max(1, len(curve) // 20)
    for made, driver, actors in [*curve[::step], curve[-1]]:
        print(f"{made:>12} {driver / _MIB:>11.0f} {' '.join(f'{value / _MIB:.0f}' for value in actors):>20}")
    # The actors are the same two processes from the first row that has both to the last.
    working = [actors for _, _, actors in curve if len(actors) == 2]
    tenth = max(1, len(working) // 10)
    growth = [
        median(row[actor] for row in working[-tenth:]) - median(row[actor] for row in working[tenth : 2 * tenth])
        for actor in range(2)
    ]
    result = {
        "planned": arguments.planned,
        "made": arguments.made,
        "format": arguments.format,
        "driver_highest_mib": round(max(driver for _, driver, _ in curve) / _MIB),
        "actor_highest_mib": round(max(max(actors, default=0) for _, _, actors in curve) / _MIB),
        "actor_growth_mib": [round(value / _MIB, 1) for value in growth],
    }
    print(json.dumps(result))


def _write(folder: Path, planned: int, made: int, shard_format: str) -> Path:
    """The job file of a destination where all but the last ``made`` shards are committed."""
    sounds = write_sounds(folder / "sounds", [_SECONDS] * 8)
    rows = [
        replace(sounds.utterances[index % 8], utterance_id=f"utt-{index:07d}")
        for index in range(planned * _UTTERANCES_PER_SHARD)
    ]
    manifest = str(folder / "sounds" / "many.parquet")
    write_corpus(manifest, rows, inventory=INVENTORY, hard_label_frame_shift_ms=10.0)
    assert len(load_corpus(manifest)) == len(rows)
    teacher = write_linear_teacher(folder / "teacher")
    changes = {
        "destination__shard_seconds": _SECONDS * _UTTERANCES_PER_SHARD,
        "destination__format": shard_format,
        "resources__num_actors": 2,
        "resources__batch_seconds": 60.0,
    }
    job = prepare(make_job(manifest, [teacher], folder / "labels", **changes))
    assert len(job.plan) == planned
    store = job.store()
    missing_shards(job)
    rng = np.random.default_rng(0)
    targets = random_targets(rng, num_frames=1, num_classes=INVENTORY.num_classes, max_entries=4, temperatures=(1.0,))
    stats = UtteranceStats(kept_mass=0.5, entropy=1.0, agreement=0.5)
    labelled = [LabelledUtterance(utterance_id=row.utterance_id, targets=targets, stats=stats) for row in rows]
    for shard_range in job.plan[: planned - made]:
        commit_rows(store, job.document, shard_range, labelled)
    return write_job(folder / "job.toml", job_fields(manifest, [teacher], folder / "labels", **changes))


def _watch(job: Path, labels: Path, before: int) -> list[tuple[int, int, list[int]]]:
    """Every second: shards made, the driver's private bytes, those of each actor."""
    command = [sys.executable, "-m", "teacher_service.cli", "run", str(job)]
    curve: list[tuple[int, int, list[int]]] = []
    with subprocess.Popen(command, env=os.environ.copy()) as process:
        while process.poll() is None:
            actors = sorted(pid for pid in descendants(process.pid) if title(pid).startswith("ray::LabellingActor"))
            made = sum(1 for _ in os.scandir(labels / "commits")) - before
            curve.append((made, resident_bytes(process.pid), [resident_bytes(pid) for pid in actors]))
            time.sleep(1.0)
    if process.returncode != 0:
        raise SystemExit(f"the run ended with {process.returncode}")
    return curve


if __name__ == "__main__":
    main()
