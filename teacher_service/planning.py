"""Planning: from a calibration to what the whole job makes, takes and costs.

Totals are ratio estimates: a sum over the sample, divided by the sample's seconds of speech and multiplied by the corpus's. A
range is the 5th to the 95th percentile of the bootstrap (Efron 1979) over the sampled batches, so 90%: it says what another
sample would have given, not what another machine or a slow store would.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from softlabel_schemas.manifest import to_bytes
from softlabel_schemas.utterance_index import num_buckets
from teacher_service.calibration import Calibration
from teacher_service.job import PreparedJob
from teacher_service.job_plan import Cost, Estimate, Plan, Prices

_RESAMPLES = 2000
_PERCENTILES = (5, 95)
# spec.json, inventory.json, manifest.json.
_DOCUMENTS = 3
_HOUR = 3600.0
# An actor holds the labels of the shard that it makes and of the one that it stores.
_SHARDS_IN_MEMORY = 2


def make_plan(job: PreparedJob, calibration: Calibration, prices: Prices | None) -> Plan:
    batches, spec = calibration.batches, job.document.spec
    seconds, num_shards = sum(job.seconds_of_shard), len(job.plan)
    of_batch = {
        name: np.array([getattr(batch, name) for batch in batches], dtype=np.float64)
        for name in (
            "seconds",
            "padded_seconds",
            "num_frames",
            "num_bytes",
            "label_seconds",
            "encode_seconds",
            "cpu_seconds",
        )
    }
    # The sample as it is, and resampled: [R + 1, N] indices of batches.
    draws = np.random.default_rng(0).integers(0, len(batches), (_RESAMPLES, len(batches)))
    drawn = np.vstack([np.arange(len(batches)), draws])
    sums = {name: values[drawn].sum(axis=1) for name, values in of_batch.items()}
    frames = sums["num_frames"] / sums["seconds"] * seconds
    overhead = calibration.shard_overhead
    of_frame = (sums["num_bytes"] - overhead * len(batches)) / np.maximum(sums["num_frames"], 1)
    documents = 2 * len(to_bytes(job.document)) + len(job.inventory.to_json())
    num_frames = _estimate(frames)
    num_bytes = _estimate(of_frame * frames + overhead * num_shards + documents)
    # An actor is held up by its slower side, or by having too few processors for both.
    limits = (sums["label_seconds"], sums["encode_seconds"], sums["cpu_seconds"] / job.config.resources.cpus_per_actor)
    pace = np.maximum.reduce(limits) / sums["padded_seconds"] * calibration.padding
    num_actors = min(job.config.resources.num_actors, num_shards)
    # The last shard is stored while nothing is labelled any more.
    tail = sums["encode_seconds"] / sums["seconds"] * job.seconds_of_shard[-1]
    longest = _makespan(job.seconds_of_shard, num_actors)
    wall_hours = _estimate((calibration.startup_seconds + pace * longest + tail) / _HOUR)
    actor_hours = wall_hours.map(lambda hours: hours * num_actors)
    frames_per_second = num_frames.expected / seconds
    files = sum(calibration.num_files(own * frames_per_second) for own in job.seconds_of_shard)
    num_puts = files + num_shards + num_buckets(job.document.storage.num_rows) + _DOCUMENTS
    num_gets = job.document.storage.num_rows + 2 * num_shards
    labels = max(job.seconds_of_shard) * frames_per_second * calibration.memory_per_frame
    return Plan(
        fingerprint=spec.fingerprint(),
        num_shards=num_shards,
        num_utterances=job.document.storage.num_rows,
        seconds=seconds,
        num_actors=num_actors,
        sampled_seconds=float(of_batch["seconds"].sum()),
        num_sampled_batches=len(batches),
        num_sampled_skipped=calibration.num_skipped,
        num_frames=num_frames,
        num_bytes=num_bytes,
        num_puts=num_puts,
        num_gets=num_gets,
        padding=1 - 1 / calibration.padding,
        wall_hours=wall_hours,
        actor_hours=actor_hours,
        memory_bytes=calibration.peak_bytes + math.ceil(_SHARDS_IN_MEMORY * labels),
        device_bytes=calibration.peak_device_bytes,
        cost=None if prices is None else _cost(prices, actor_hours, num_bytes, num_puts, num_gets),
    )


def _estimate(values: npt.NDArray[np.float64]) -> Estimate:
    """Of the sample itself, which comes first, and of its resamples."""
    low, high = np.percentile(values[1:], _PERCENTILES)
    return Estimate(expected=float(values[0]), low=float(low), high=float(high))


def _makespan(seconds_of_shard: Sequence[float], num_actors: int) -> float:
    """Seconds of speech that the busiest actor labels where each takes the next shard when it is free."""
    loads = [0.0] * num_actors
    for seconds in seconds_of_shard:
        heapq.heapreplace(loads, loads[0] + seconds)
    return max(loads)


def _cost(prices: Prices, actor_hours: Estimate, num_bytes: Estimate, num_puts: int, num_gets: int) -> Cost:
    return Cost(
        currency=prices.currency,
        labelling=actor_hours.map(lambda hours: hours * prices.actor_hour),
        requests=(num_puts * prices.per_1000_puts + num_gets * prices.per_1000_gets) / 1000,
        storage_month=num_bytes.map(lambda stored: stored / 2**30 * prices.gib_month),
    )
