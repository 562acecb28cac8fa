"""Runs of any number of shards without the shards, and the steps over them that are measured.

Commit records are of the project's own classes, each with digests of its own. The shards that they name are not there: neither
opening, nor the resume decision, nor publishing reads one.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import botocore.session
import numpy as np

from softlabel_schemas import ClassInventory, layout, open_dataset
from softlabel_schemas.commit import begin, commit_shard, publish, read_commits
from softlabel_schemas.digest import sha256_hex
from softlabel_schemas.file_records import FileRecord, FileRecords
from softlabel_schemas.manifest import CommitRecord, SpecDocument, to_bytes
from softlabel_schemas.object_store import ObjectStore
from softlabel_schemas.plan import ShardRange
from softlabel_schemas.shard import LabelledUtterance, UtteranceStats
from softlabel_schemas.targets import SoftTargets
from teacher_service.config import load_job
from teacher_service.job import PreparedJob, missing_shards, prepare
from teacher_service.status import read_status
from tests.benchmarks.fresh_process import Step
from tests.support.manifests import SECONDS, write_large_manifest
from tests.support.teachers import job_fields, write_job, write_linear_teacher

INVENTORY = ClassInventory(names=tuple(f"senone-{index}" for index in range(3_000)))
_TOP_K = 20
_RECORDS_AT_ONCE = 1_000


def write_records(folder: Path, url: str, num_shards: int, shard_format: str) -> Path:
    """A begun run with a commit record for every shard; returns its job file."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = write_large_manifest(folder / "corpus.parquet", num_shards, None)
    teacher = write_linear_teacher(folder / "teacher", inventory=INVENTORY, num_classes=INVENTORY.num_classes)
    changes = {
        "destination__shard_seconds": SECONDS,
        "destination__format": shard_format,
        "selection": {"policy": "top_k", "k": _TOP_K},
    }
    path = write_job(folder / "job.toml", job_fields(str(manifest), [teacher], url, **changes))
    job = prepare(load_job(path))
    assert len(job.plan) == num_shards
    store = job.store()
    begin(store, job.document, job.inventory)
    for objects in _records(job):
        if store.is_local:
            # Not through the store, which would flush each to the disk.
            (Path(url) / layout.COMMITS).mkdir(exist_ok=True)
            for key, data in objects.items():
                (Path(url) / key).write_bytes(data)
        else:
            store.put_many(objects)
    return path


def _records(job: PreparedJob) -> Iterator[dict[str, bytes]]:
    """By key, some at a time: that of a real shard under another index, with other digests."""
    record = real_record(job.document, num_frames=1_000)
    for start in range(0, len(job.plan), _RECORDS_AT_ONCE):
        yield {
            layout.commit_record(each.index): to_bytes(_renamed(record, each))
            for each in job.plan[start : start + _RECORDS_AT_ONCE]
        }


def _renamed(record: CommitRecord, shard_range: ShardRange) -> CommitRecord:
    files = FileRecords.of(
        [
            FileRecord(name=f.name, num_bytes=f.num_bytes, sha256=sha256_hex(f"{f.name}{shard_range.index}".encode()))
            for f in record.shard.files
        ]
    )
    place = {"index": shard_range.index, "first_row": shard_range.first_row, "files": files}
    return record.model_copy(update={"shard": record.shard.model_copy(update=place)})


def real_record(document: SpecDocument, num_frames: int) -> CommitRecord:
    """Of a shard of one utterance that is really encoded; its files are forgotten."""
    stats = UtteranceStats(kept_mass=0.9, entropy=1.0, agreement=0.5)
    targets = _random_targets(num_frames, document.spec.temperatures)
    utterance = LabelledUtterance(utterance_id="utterance", targets=targets, stats=stats)
    first = ShardRange(index=0, first_row=0, num_rows=1)
    with tempfile.TemporaryDirectory() as folder:
        return commit_shard(ObjectStore(folder), document, first, [utterance], [])


def _random_targets(num_frames: int, temperatures: tuple[float, ...]) -> SoftTargets:
    """Of the likeliest classes alone: whole posteriors of an hour would take gigabytes."""
    rng = np.random.default_rng(0)
    ids_TK = rng.permuted(
        np.cumsum(rng.integers(1, INVENTORY.num_classes // _TOP_K, (num_frames, _TOP_K)), axis=1), axis=1
    )
    probs_TK = np.sort(rng.dirichlet(np.full(_TOP_K + 1, 0.3), num_frames), axis=1)[:, ::-1].clip(1e-6)
    tail_T = 1 - probs_TK[:, :_TOP_K].sum(axis=1)
    return SoftTargets(
        num_classes=INVENTORY.num_classes,
        temperatures=temperatures,
        offsets=np.arange(num_frames + 1) * _TOP_K,
        class_ids=ids_TK.astype(np.int32).reshape(-1),
        log_probs=np.log(probs_TK[:, :_TOP_K]).astype(np.float32).reshape(-1),
        tail_mass=np.repeat(tail_T.clip(0, 1).astype(np.float32)[:, None], len(temperatures), axis=1),
    )


# The steps that are measured, each in its own process


def opening(url: str) -> Step:
    """Baseline: the bytes read, hashed and parsed as JSON, nothing checked."""
    store = ObjectStore(url)

    def parse() -> None:
        data = store.read(layout.MANIFEST)
        sha256_hex(data)
        json.loads(data)

    return Step(run=lambda: open_dataset(url).num_shards, baseline=parse)


def resuming(job: str) -> Step:
    """``missing_shards``: begin and the listing; counts the shards that are left. Baseline: a listing alone."""
    prepared = prepare(load_job(job))
    return Step(run=lambda: len(missing_shards(prepared)), baseline=lambda: _listing(prepared.config.destination.url))


def status(job: str) -> Step:
    url = load_job(job).destination.url
    return Step(run=lambda: len(read_status(url).missing), baseline=lambda: _listing(url))


def publishing(job: str) -> Step:
    """Baseline: the records read and checked, which is what publishing begins with, a few at a time."""
    prepared = prepare(load_job(job))
    store, document = prepared.store(), prepared.document

    def run() -> int:
        publish(store, document)
        return document.storage.num_shards

    def read() -> None:
        for start in range(0, document.storage.num_shards, _RECORDS_AT_ONCE):
            read_commits(store, document, range(start, min(start + _RECORDS_AT_ONCE, document.storage.num_shards)))

    return Step(run=run, baseline=read)


def _listing(url: str) -> int:
    if not url.startswith("s3://"):
        return sum(1 for _ in os.scandir(Path(url) / layout.COMMITS))
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    client = botocore.session.Session().create_client("s3")
    pages: Sequence[dict[str, Any]] = list(
        client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/{layout.COMMITS}/")
    )
    client.close()
    return sum(page["KeyCount"] for page in pages)
