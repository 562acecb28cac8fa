"""Requests and bytes of an epoch: counted on a real S3 server for a small dataset, and what they come to at full size.

Shards and pools of the small dataset stand in the ratio that they have at full size with the default settings: a shard is four
times the speech of a pool.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from softlabel_schemas import open_dataset
from student_trainer.order import Order
from tests.benchmarks.curves import Curve
from tests.benchmarks.figures import Figure
from tests.benchmarks.scale_planning import HOURS, NUM_SHARDS
from tests.support.datasets import random_utterance, write_dataset
from tests.support.fault_proxy import FaultProxy
from tests.support.rgw import Rgw, s3_environment

# The student's default; a shard at full size has 40 hours.
_POOL_SECONDS = 36_000.0
_SHARDS_PER_POOL = _POOL_SECONDS / (HOURS * 3600 / NUM_SHARDS)
_UTTERANCE_SECONDS = 0.4
_UTTERANCES_PER_SHARD = 100


@dataclass
class _Meter(FaultProxy):
    """Counts bytes too: those of whole responses, as sent. It makes no fault."""

    num_bytes: int = field(default=0, init=False)

    async def _forward(self, request: Any) -> bytes:
        response = await super()._forward(request)
        self.num_bytes += len(response)
        return response


@dataclass(frozen=True, slots=True, kw_only=True)
class _Traffic:
    requests: int
    num_bytes: int


def figures(server: Rgw, num_shards: int) -> list[Figure]:
    found: list[Figure] = []
    for shard_format in ("parquet", "zarr"):
        found += _figures(server, num_shards, shard_format)
    return found


def _figures(server: Rgw, num_shards: int, shard_format: str) -> list[Figure]:
    rng, num_frames = np.random.default_rng(0), round(100 * _UTTERANCE_SECONDS)
    rows = [random_utterance(rng, f"utterance-{i}", num_frames) for i in range(num_shards * _UTTERANCES_PER_SHARD)]
    url = f"s3://{server.bucket}/epoch-{shard_format}-{num_shards}"
    with s3_environment(server.environment()):
        written = write_dataset(url, shard_format=shard_format, num_shards=num_shards, rows=rows)
    stored, count = written.manifest.num_bytes, len(rows)
    with _Meter(server.endpoint) as proxy, s3_environment(server.environment() | {"AWS_ENDPOINT_URL": proxy.endpoint}):
        dataset = open_dataset(url)
        in_order = _traffic(proxy, lambda: sum(len(shard) for shard in dataset.iter_shards()))
        first = _traffic(proxy, lambda: dataset[rows[0].utterance_id])
        seconds_N = np.full(count, _UTTERANCE_SECONDS)
        pool_seconds = _SHARDS_PER_POOL * _UTTERANCES_PER_SHARD * _UTTERANCE_SECONDS
        pools = Order(seed=0, batch_seconds=pool_seconds / 4, pool_seconds=pool_seconds).pools(seconds_N, epoch=0)

        def shuffled() -> None:
            for batches in pools:
                dataset.read_utterances([rows[row].utterance_id for batch in batches for row in batch])

        mixed = _traffic(proxy, shuffled)
    what = f"{num_shards} {shard_format} shards, {stored:,} bytes"
    return [
        _requests(f"epoch in order, {shard_format}", in_order, num_shards, what),
        _bytes(f"epoch in order, {shard_format}", in_order, stored),
        _requests(f"shuffled epoch, {shard_format}", mixed, num_shards, what),
        _bytes(f"shuffled epoch, {shard_format}", mixed, stored),
        _requests(f"first access by id, {shard_format}", first, num_shards, what),
        _bytes(f"first access by id, {shard_format}", first, stored),
    ]


def _traffic(proxy: _Meter, step: Callable[[], object]) -> _Traffic:
    requests, num_bytes = proxy.num_requests, proxy.num_bytes
    step()
    return _Traffic(requests=proxy.num_requests - requests, num_bytes=proxy.num_bytes - num_bytes)


def _requests(name: str, traffic: _Traffic, num_shards: int, what: str) -> Figure:
    each, piece = traffic.requests / num_shards, "1 MiB chunk" if "zarr" in name else "64 MiB that are read"
    return Figure(
        name=f"{name}: requests",
        unit="requests",
        value=float(traffic.requests),
        baseline=float(num_shards),
        baseline_name="shards",
        note=f"real, counted by a proxy: {what}; at full size {each * NUM_SHARDS:,.0f}, and one more for each {piece}",
    )


def _bytes(name: str, traffic: _Traffic, stored: int) -> Figure:
    return Figure(
        name=f"{name}: bytes",
        unit="bytes",
        value=float(traffic.num_bytes),
        baseline=float(stored),
        baseline_name="stored bytes of the shards",
        note="real, with the headers of responses; the ratio is that of full size",
    )


def order_of_epoch(sizes: Sequence[int]) -> Figure:
    """Seconds that the student needs to order an epoch (``Order.pools``), over utterances."""
    values = []
    for num_utterances in sizes:
        seconds_N = np.random.default_rng(0).uniform(2, 14, num_utterances)
        started = time.perf_counter()
        Order(seed=0, batch_seconds=600.0, pool_seconds=_POOL_SECONDS).pools(seconds_N, epoch=0)
        values.append(time.perf_counter() - started)
    curve = Curve(name="order of an epoch", size_name="utterances", unit="s", sizes=sizes, values=values)
    return curve.figure(f"real; extrapolated to 500,000,000: {curve.at(5e8):,.0f} s")
