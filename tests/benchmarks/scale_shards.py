"""What grows with shards: the manifest, opening, the resume decision, publishing; on local disk and on a real S3 server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softlabel_schemas import layout
from softlabel_schemas.manifest import SpecDocument
from softlabel_schemas.object_store import MAX_DOCUMENT_BYTES, ObjectStore
from teacher_service.config import load_job
from teacher_service.job import prepare
from tests.benchmarks.curves import Curve
from tests.benchmarks.figures import Figure, median_and_spread
from tests.benchmarks.fresh_process import Measured, Step, measure
from tests.benchmarks.scale_planning import HOURS, NUM_SHARDS
from tests.benchmarks.scale_records import opening, publishing, real_record, resuming, status, write_records
from tests.support.rgw import Rgw, s3_environment

_OPEN_SECONDS, _RESUME_SECONDS = 2.0, 30.0
_BASELINES = {
    "opening": "read, sha256 and json.loads",
    "resume decision": "a listing alone",
    "status": "a listing alone",
    "publishing": "the records read and checked",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """A run of ``num_shards`` in one place: "disk" or "S3"."""

    place: str
    shard_format: str
    num_shards: int
    url: str
    job: Path


def figures(folder: Path, server: Rgw, shards: Sequence[int], repeats: int) -> list[Figure]:
    found: list[Figure] = []
    with s3_environment(server.environment()):
        for shard_format in ("parquet", "zarr"):
            local = [_write(folder, str(folder / "labels"), "disk", shard_format, count) for count in shards]
            found += _published(local, repeats)
            found += _manifest_size(local)
            if shard_format == "parquet":
                remote = [_write(folder, f"s3://{server.bucket}", "S3", shard_format, count) for count in shards]
                found += _resumed(remote, repeats)
                found += _published(remote, repeats)
            else:
                # The records of both formats are listed and fetched alike.
                remote = [_copied(local[-1], f"s3://{server.bucket}/manifest-alone")]
                found += _over_shards("opening", opening, remote, repeats, _OPEN_SECONDS, by_url=True)
        found += [_full_size(local[-1], hours=HOURS / NUM_SHARDS)]
    return found


def _write(folder: Path, base: str, place: str, shard_format: str, num_shards: int) -> _Run:
    name = f"{place}-{shard_format}-{num_shards}"
    job = write_records(folder / name, f"{base}/{name}", num_shards, shard_format)
    return _Run(place=place, shard_format=shard_format, num_shards=num_shards, url=f"{base}/{name}", job=job)


def _copied(run: _Run, url: str) -> _Run:
    ObjectStore(url).put(layout.MANIFEST, ObjectStore(run.url).read(layout.MANIFEST))
    return _Run(place="S3", shard_format=run.shard_format, num_shards=run.num_shards, url=url, job=run.job)


def _resumed(runs: Sequence[_Run], repeats: int) -> list[Figure]:
    return [
        *_over_shards("resume decision", resuming, runs, repeats, _RESUME_SECONDS),
        *_over_shards("status", status, runs, repeats, None),
    ]


def _published(runs: Sequence[_Run], repeats: int) -> list[Figure]:
    # Publishing again changes nothing, but this is the first time: once.
    return [
        *_over_shards("publishing", publishing, runs, 1, None),
        *_over_shards("opening", opening, runs, repeats, _OPEN_SECONDS, by_url=True),
    ]


def _over_shards(
    step: str,
    function: Callable[..., Step],
    runs: Sequence[_Run],
    repeats: int,
    max_seconds: float | None,
    *,
    by_url: bool = False,
) -> list[Figure]:
    """Seconds and memory at the largest number of shards, and the curve where there are several."""
    last = runs[-1]
    what = f"{step}, {last.shard_format}, {last.place}"
    measured: list[list[Measured]] = []
    for run in runs:
        arguments: dict[str, Any] = {"url": run.url} if by_url else {"job": str(run.job)}
        measured.append([measure(function, **arguments) for _ in range(repeats if run is last else 1)])
        expected = 0 if function in (resuming, status) else run.num_shards
        assert {each.count for each in measured[-1]} == {expected}, f"{what}: {measured[-1]}"
    seconds, spread = median_and_spread([each.seconds for each in measured[-1]])
    processor, _ = median_and_spread([each.processor_seconds for each in measured[-1]])
    peak_mb, idle_mb = max(each.peak_mb for each in measured[-1]), measured[-1][0].idle_mb
    found = [
        Figure(
            name=f"{what}: {last.num_shards:,} shards",
            unit="s",
            value=seconds,
            baseline=median_and_spread([each.baseline_seconds for each in measured[-1]])[0],
            baseline_name=_BASELINES[step],
            target="" if max_seconds is None else f"<= {max_seconds:g} s",
            met=None if max_seconds is None else seconds <= max_seconds,
            spread=spread,
            note=f"real; {processor:.2f} s of processor time; peak {peak_mb:.0f} MB, of which {idle_mb:.0f} before",
        )
    ]
    if len(runs) > 1:
        values = [median_and_spread([each.seconds for each in each_size])[0] for each_size in measured]
        sizes = [run.num_shards for run in runs]
        found.append(Curve(name=what, size_name="shards", unit="s", sizes=sizes, values=values).figure("real"))
    return found


def _manifest_size(runs: Sequence[_Run]) -> list[Figure]:
    sizes = [ObjectStore(run.url).size(layout.MANIFEST) for run in runs]
    last = runs[-1]
    what = f"manifest, {last.shard_format}"
    curve = Curve(
        name=what,
        size_name="shards",
        unit="bytes",
        sizes=[run.num_shards for run in runs],
        values=list(map(float, sizes)),
    )
    return [
        Figure(
            name=f"{what}: {last.num_shards:,} shards",
            unit="bytes",
            value=float(sizes[-1]),
            target=f"<= {MAX_DOCUMENT_BYTES >> 20} MiB",
            met=sizes[-1] <= MAX_DOCUMENT_BYTES,
            note=f"real, for shards of 10 s; {sizes[-1] / last.num_shards:,.0f} bytes a shard",
        ),
        curve.figure("real"),
    ]


def _full_size(run: _Run, hours: float) -> Figure:
    """Zarr's manifest names every chunk: a line through the real shards of 6 and 12 minutes."""
    job = prepare(load_job(run.job))
    few, many = (_num_files(job.document, num_frames) for num_frames in (36_000, 72_000))
    num_files = few + (many - few) * (hours * 10 - 1)
    size, files_now = ObjectStore(run.url).size(layout.MANIFEST), _num_files(job.document, 1_000)
    file_bytes = len(real_record(job.document, 1_000).shard.files[-1].model_dump_json())
    value = NUM_SHARDS * (size / run.num_shards + (num_files - files_now) * (file_bytes + 1))
    return Figure(
        name=f"manifest, zarr: {NUM_SHARDS:,} shards of {hours:g} h",
        unit="bytes",
        value=value,
        target=f"<= {MAX_DOCUMENT_BYTES >> 20} MiB",
        met=value <= MAX_DOCUMENT_BYTES,
        note=f"extrapolated: {num_files:,.0f} files a shard, {file_bytes} bytes each; what is too large, planning refuses",
    )


def _num_files(document: SpecDocument, num_frames: int) -> int:
    return len(real_record(document, num_frames).shard.files)
