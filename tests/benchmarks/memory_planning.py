"""Peak memory of the driver of a large job: preparing it, and publishing what its actors committed.

    python -m tests.benchmarks.memory_planning                     # a table; about 10 minutes, 1 GB of disk
    python -m tests.benchmarks.memory_planning --rows 10000 --json memory.json

Each figure is of a process of its own: its largest resident set; what torch and the other imports have of it is
given apart. Teachers, manifests and records are real; the audio does not exist, since neither step reads it.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from softlabel_schemas import ClassInventory, layout
from softlabel_schemas.commit import begin, commit_shard
from softlabel_schemas.manifest import CommitRecord, FileRecord, SpecDocument, to_bytes
from softlabel_schemas.object_store import ObjectStore
from softlabel_schemas.plan import ShardRange
from softlabel_schemas.shard import LabelledUtterance, UtteranceStats
from teacher_service.config import TeacherConfig
from teacher_service.job import prepare, publish_job
from tests.support.manifests import SECONDS, write_large_manifest
from tests.support.targets import random_targets
from tests.support.teachers import make_job, write_linear_teacher

ROWS_PUBLISHED = 100_000
INVENTORY = ClassInventory(names=tuple(f"senone-{index}" for index in range(3_000)))
# Twice what a frame has in the mean.
MAX_ENTRIES = 28


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """``idle_mb``: of the same process before the step."""

    step: str
    rows: int
    shards: int
    idle_mb: float
    peak_mb: float
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--shards", type=int, default=25_000)
    parser.add_argument(
        "--steps", nargs="+", choices=["prepare", "parquet", "zarr"], default=["prepare", "parquet", "zarr"]
    )
    parser.add_argument("--folder", type=Path, help="for the manifests and records; default: a temporary one")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(_measure(json.loads(arguments.child))))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        found = []
        print(f"{'step':<16}{'utterances':>12}{'shards':>10}{'idle MB':>10}{'peak MB':>10}{'seconds':>10}")
        for measured in _all(Path(folder), arguments.rows, arguments.shards, arguments.steps):
            found.append(measured)
            print(
                f"{measured.step:<16}{measured.rows:>12,}{measured.shards:>10,}"
                f"{measured.idle_mb:>10.0f}{measured.peak_mb:>10.0f}{measured.seconds:>10.1f}",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(measured) for measured in found], indent=2) + "\n")


def _all(folder: Path, all_rows: list[int], num_shards: int, steps: list[str]) -> Iterator[Measured]:
    teacher = write_linear_teacher(folder / "teacher", inventory=INVENTORY, num_classes=INVENTORY.num_classes)
    for num_rows in all_rows if "prepare" in steps else ():
        manifest = write_large_manifest(folder / f"{num_rows}.parquet", num_rows, INVENTORY)
        yield _in_a_process("prepare", _job(folder, manifest, teacher, num_rows, num_shards, "parquet"), num_rows)
        manifest.unlink()
    for shard_format in steps:
        if shard_format == "prepare":
            continue
        # As many shards as asked for: each row of 10 s is less than one.
        num_rows = max(ROWS_PUBLISHED, num_shards)
        manifest = write_large_manifest(folder / "published.parquet", num_rows, INVENTORY)
        job = _job(folder, manifest, teacher, num_rows, num_shards, shard_format)
        _commit_all(job)
        yield _in_a_process("publish", job, num_rows)


def _job(
    folder: Path, manifest: Path, teacher: TeacherConfig, num_rows: int, num_shards: int, shard_format: str
) -> dict[str, Any]:
    return {
        "manifest": str(manifest),
        "teacher": teacher.model_dump(mode="json"),
        "url": str(folder / f"labels-{shard_format}"),
        "shard_seconds": max(num_rows * SECONDS / num_shards, SECONDS),
        "format": shard_format,
    }


def _config(job: dict[str, Any]) -> Any:
    return make_job(
        job["manifest"],
        [TeacherConfig(**job["teacher"])],
        job["url"],
        destination__shard_seconds=job["shard_seconds"],
        destination__format=job["format"],
        errors={"on_error": "skip"},
        selection={"policy": "top_k", "k": MAX_ENTRIES},
    )


def _commit_all(fields: dict[str, Any]) -> None:
    """A commit record for every shard: that of a real shard of the size that it would have, under another index."""
    job = prepare(_config(fields))
    store, folder = job.store(), Path(fields["url"])
    begin(store, job.document, job.inventory)
    record = _real_record(job.document)
    (folder / layout.COMMITS).mkdir(exist_ok=True)
    for shard_range in job.plan:
        # What differs between records is as long: no digest is shared.
        shard = record.shard.model_copy(
            update={
                "index": shard_range.index,
                "first_row": shard_range.first_row,
                "num_rows": shard_range.num_rows,
                "num_utterances": shard_range.num_rows,
                "files": tuple(
                    FileRecord(name=file.name, num_bytes=file.num_bytes, sha256=f"{shard_range.index:064x}")
                    for file in record.shard.files
                ),
            }
        )
        data = to_bytes(CommitRecord(fingerprint=record.fingerprint, shard=shard, label_hash=record.label_hash))
        # Not through the store, which would flush each to the disk.
        (folder / layout.commit_record(shard_range.index)).write_bytes(data)


def _real_record(document: SpecDocument) -> CommitRecord:
    """40 utterances of 10 s with 14 entries a frame: what a shard of one million utterances in 25,000 shards holds."""
    rng = np.random.default_rng(0)
    stats = UtteranceStats(kept_mass=0.9, entropy=1.0, agreement=0.5)
    targets = random_targets(
        rng, num_frames=1_000, num_classes=INVENTORY.num_classes, max_entries=MAX_ENTRIES, temperatures=(1.0,)
    )
    utterances = [LabelledUtterance(utterance_id=f"{index}", targets=targets, stats=stats) for index in range(40)]
    first = ShardRange(index=0, first_row=0, num_rows=len(utterances))
    with tempfile.TemporaryDirectory() as folder:
        return commit_shard(ObjectStore(folder), document, first, utterances, [])


def _in_a_process(step: str, job: dict[str, Any], num_rows: int) -> Measured:
    call = [sys.executable, "-m", __spec__.name, "--child", json.dumps({"step": step, "job": job})]
    done = subprocess.run(call, check=True, capture_output=True, text=True)
    name = step if step == "prepare" else f"{step} {job['format']}"
    return Measured(step=name, rows=num_rows, **json.loads(done.stdout.splitlines()[-1]))


def _measure(call: dict[str, Any]) -> dict[str, Any]:
    """In the process that is measured."""
    idle_mb, started = _peak_mb(), time.monotonic()
    config = _config(call["job"])
    job = prepare(config)
    if call["step"] == "publish":
        publish_job(job)
    return {
        "shards": len(job.plan),
        "idle_mb": idle_mb,
        "peak_mb": _peak_mb(),
        "seconds": time.monotonic() - started,
    }


def _peak_mb() -> float:
    """Largest resident set so far. On Linux ``ru_maxrss`` would begin with that of the parent process."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 1e3
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)


if __name__ == "__main__":
    main()
