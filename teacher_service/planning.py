"""Planning: from a calibration to what the whole job makes, takes and costs.

Totals are ratio estimates: a sum over the sample, divided by the sample's seconds of speech and multiplied by the corpus's. A
range is the 5th to the 95th percentile of the bootstrap (Efron 1979) over the sampled batches, so 90%: it says what another
sample would have given, not what another machine or a slow store would.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import fields

import numpy as np
import numpy.typing as npt

from softlabel_schemas.manifest import to_bytes
from softlabel_schemas.utterance_index import num_buckets
from teacher_service.calibration import BatchSample, Calibration
from teacher_service.job import PreparedJob
from teacher_service.job_plan import Cost, Estimate, Plan, Prices

_RESAMPLES = 2000
_PERCENTILES = (5, 95)
# spec.json, inventory.json, about.json, manifest.json.
_DOCUMENTS = 4
_HOUR = 3600.0
# An actor holds the labels of the shard that it makes and of the one that it stores.
_SHARDS_IN_MEMORY = 2

Values = npt.NDArray[np.float64]


def make_plan(job: PreparedJob, calibration: Calibration, prices: Prices | None) -> Plan:
    """
    Args:
        prices: None plans no cost.
    """
    storage, sums = job.document.storage, _sums(calibration.batches)
    seconds, num_shards = sum(job.seconds_of_shard), len(job.plan)
    frames = sums["num_frames"] / sums["seconds"] * seconds
    overhead = calibration.shard_overhead
    # A batch without frames was no shard; and what others have of the overhead, a small one may not have.
    bytes_of_labels = np.maximum(sums["num_bytes"] - overhead * sums["num_stored"], 0)
    bytes_of_frame = bytes_of_labels / np.maximum(sums["num_frames"], 1)
    documents = 2 * len(to_bytes(job.document)) + len(job.inventory.to_json())
    num_frames = _estimate(frames)
    num_bytes = _estimate(bytes_of_frame * frames + overhead * num_shards + documents)
    num_actors = min(job.config.resources.num_actors, num_shards)
    wall_hours = _estimate(_wall_seconds(job, calibration, sums, num_actors) / _HOUR)
    actor_hours = wall_hours.map(lambda hours: hours * num_actors)
    frame_rate = num_frames.expected / seconds
    files = sum(calibration.num_files(own * frame_rate) for own in job.seconds_of_shard)
    num_puts = files + num_shards + num_buckets(storage.num_rows) + _DOCUMENTS
    num_gets = storage.num_rows + 2 * num_shards
    labels = max(job.seconds_of_shard) * frame_rate * calibration.memory_per_frame
    return Plan(
        fingerprint=job.document.spec.fingerprint(),
        num_shards=num_shards,
        num_utterances=storage.num_rows,
        seconds=seconds,
        num_actors=num_actors,
        sampled_seconds=sum(batch.seconds for batch in calibration.batches),
        num_sampled_batches=len(calibration.batches),
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


def _sums(batches: Sequence[BatchSample]) -> dict[str, Values]:
    """Of each quantity, its sum over the batches: as they were sampled, and resampled R times, float64 [1 + R].
    ``num_stored`` are those with frames."""
    draws = np.random.default_rng(0).integers(0, len(batches), (_RESAMPLES, len(batches)))
    drawn = np.vstack([np.arange(len(batches)), draws])
    values = {field.name: [getattr(batch, field.name) for batch in batches] for field in fields(BatchSample)}
    values["num_stored"] = [batch.num_frames > 0 for batch in batches]
    return {name: np.array(of_batches, np.float64)[drawn].sum(axis=1) for name, of_batches in values.items()}


def _wall_seconds(job: PreparedJob, calibration: Calibration, sums: dict[str, Values], num_actors: int) -> Values:
    """[1 + R]. An actor is held up by its slower side, labelling or storing, or by having too few processors for both."""
    limits = (sums["label_seconds"], sums["encode_seconds"], sums["cpu_seconds"] / job.config.resources.cpus_per_actor)
    pace = np.maximum.reduce(limits) / sums["padded_seconds"] * calibration.padding
    # The last shard is stored while nothing is labelled any more.
    tail = sums["encode_seconds"] / sums["seconds"] * job.seconds_of_shard[-1]
    wall: Values = calibration.startup_seconds + pace * _makespan(job.seconds_of_shard, num_actors) + tail
    return wall


def _estimate(values: Values) -> Estimate:
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
