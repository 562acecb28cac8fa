"""Calibration: a sample of the corpus, labelled and encoded in this process by the code that a run uses.

    utterances of evenly spaced shards -> label_shard -> encode_shard, a batch at a time -> Calibration

The sample is a function of the job. Its utterances are batched together, so that their batches are as full as a run's; how much
of those is padding is computed from the durations in whole shards. Nothing is stored: how fast the destination takes the shards
is not measured.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from softlabel_schemas.commit import encode_shard
from softlabel_schemas.containers import CONTAINERS
from softlabel_schemas.corpus import Corpus
from softlabel_schemas.digest import canonical_json
from softlabel_schemas.distance import distance
from softlabel_schemas.errors import InputError
from softlabel_schemas.manifest import to_bytes
from softlabel_schemas.plan import ShardRange
from softlabel_schemas.selection import SampledSelection
from softlabel_schemas.shard import LabelledUtterance
from softlabel_schemas.utterance_index import ENTRY
from teacher_service.job import PreparedJob
from teacher_service.pipeline import BatchDone, LabelledShard, batches_of, label_shard
from teacher_service.teacher import Teacher, check_gpu, load_teachers

# Each is read for its durations: more say little more of the padding.
_MAX_SHARDS = 16
# Of one frame, nats: what bfloat16 rounds is less, the edge of an utterance without a mask is more.
_PADDING_KL = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSample:
    """One batch of the sample.

    Attributes:
        seconds, padded_seconds: of speech, without and with what the batch was padded with.
        num_bytes: stored, of a shard that held this batch alone.
        label_seconds: that passed while it was labelled, reading ahead and capturing behind included.
        encode_seconds: that encoding and checking took.
        cpu_seconds: of both, all threads together.
    """

    seconds: float
    padded_seconds: float
    num_frames: int
    num_bytes: int
    label_seconds: float
    encode_seconds: float
    cpu_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """
    Attributes:
        shard_overhead: bytes that a shard has however small it is.
        memory_per_frame: bytes of the labels in memory.
        padding: padded seconds for each second of speech, in the job's own batches.
        startup_seconds: to load the teachers, and what a first batch takes longer than it does later.
        peak_bytes: memory that this process has had, of the machine and of the device.
        num_files: of a shard with so many frames.
    """

    batches: tuple[BatchSample, ...]
    num_skipped: int
    shard_overhead: float
    memory_per_frame: float
    padding: float
    startup_seconds: float
    peak_bytes: int
    peak_device_bytes: int
    num_files: Callable[[float], int]


def calibrate(job: PreparedJob, num_batches: int, on_seconds: Callable[[float], None] = lambda _: None) -> Calibration:
    """Label about ``num_batches`` full batches, or the whole corpus where it has fewer.

    Args:
        on_seconds: told the seconds of speech that are labelled, whenever there are more.

    Raises:
        InputError: the teachers cannot be loaded, no utterance of the sample could be labelled, or its labels depend on what
            it is padded with.
        UtteranceError: an utterance cannot be labelled and the job would fail.
    """
    check_gpu(job.config)
    began = time.monotonic()
    teachers = load_teachers(job.config, job.document.spec)
    startup_seconds = time.monotonic() - began
    sample, padding = _sample(job, teachers, num_batches)
    batches = _batches(job, sample, teachers)
    began = time.monotonic()
    # What is compiled or allocated once is done with the longest utterances, as in a run.
    first = _label(job, sample.where(_mask(len(sample), batches[0])), teachers)
    _encoded_bytes(job, first.utterances)
    first_seconds = time.monotonic() - began
    labelled, samples = _measured(job, sample, batches, teachers, on_seconds)
    _check_padding(job, sample, batches, teachers, labelled)
    startup_seconds += max(0.0, first_seconds - samples[0].label_seconds - samples[0].encode_seconds)
    pooled_bytes, files = _encoded_bytes(job, labelled.utterances)
    num_frames = sum(batch.num_frames for batch in samples)
    shards = [batch.num_bytes for batch in samples if batch.num_frames]
    container = CONTAINERS[job.document.storage.shard_format]
    return Calibration(
        batches=samples,
        num_skipped=len(labelled.skipped),
        # Each batch has been a shard: what all of them take more than one shard of them all.
        shard_overhead=(sum(shards) - pooled_bytes) / (len(shards) - 1) if len(shards) > 1 else 0.0,
        memory_per_frame=sum(map(_memory, labelled.utterances)) / num_frames,
        padding=padding,
        startup_seconds=startup_seconds,
        peak_bytes=_peak_bytes(),
        peak_device_bytes=torch.cuda.max_memory_allocated() if teachers[0].device.type == "cuda" else 0,
        num_files=lambda frames: container.num_files(files, frames / num_frames),
    )


def _measured(
    job: PreparedJob,
    sample: Corpus,
    batches: list[list[int]],
    teachers: list[Teacher],
    on_seconds: Callable[[float], None],
) -> tuple[LabelledShard, tuple[BatchSample, ...]]:
    """The sample labelled as one shard is, and then encoded a batch at a time. Raises InputError where nothing was labelled."""
    finished: list[float] = []
    done = 0.0

    def on_batch(batch: BatchDone) -> None:
        nonlocal done
        finished.append(time.monotonic())
        done += batch.seconds
        on_seconds(done)

    cpu, began = time.process_time(), time.monotonic()
    labelled = _label(job, sample, teachers, on_batch)
    cpu = time.process_time() - cpu
    label_seconds = np.diff([began, *finished])
    utterances = {utterance.utterance_id: utterance for utterance in labelled.utterances}
    if not utterances:
        raise InputError(f"no utterance of the sample could be labelled, the first: {labelled.skipped[0].reason}")
    seconds, ids = sample.seconds(), sample.table["utterance_id"].to_pylist()
    samples = []
    for batch, passed in zip(batches, label_seconds, strict=True):
        own = [utterances[ids[row]] for row in sorted(batch) if ids[row] in utterances]
        began, cpu_began = time.monotonic(), time.process_time()
        num_bytes = _encoded_bytes(job, own)[0]
        samples.append(
            BatchSample(
                seconds=float(seconds[batch].sum()),
                padded_seconds=float(seconds[batch].max() * len(batch)),
                num_frames=sum(utterance.targets.num_frames for utterance in own),
                num_bytes=num_bytes,
                label_seconds=float(passed),
                encode_seconds=time.monotonic() - began,
                cpu_seconds=cpu * float(passed / label_seconds.sum()) + time.process_time() - cpu_began,
            )
        )
    return labelled, tuple(samples)


def _check_padding(
    job: PreparedJob, sample: Corpus, batches: list[list[int]], teachers: list[Teacher], labelled: LabelledShard
) -> None:
    """Raises InputError where an utterance has other labels alone than in its batch: the one that was padded most.

    A run could not tell, nor could an audit, which makes the same batches. One class more or less of a sample says nothing.
    """
    if isinstance(job.document.spec.selection, SampledSelection):
        return
    seconds, ids = sample.seconds(), sample.table["utterance_id"].to_pylist()
    in_batch = {utterance.utterance_id: utterance.targets for utterance in labelled.utterances}
    shares = [
        (float(seconds[row] / seconds[batch].max()), row) for batch in batches for row in batch if ids[row] in in_batch
    ]
    share, row = min(shares)
    if share == 1:
        return
    padded = in_batch[ids[row]]
    alone = next(
        (each.targets for each in _label(job, sample.where(_mask(len(sample), [row])), teachers).utterances), None
    )
    if alone is None or alone.num_frames != padded.num_frames:
        found = f"{padded.num_frames} frames in a batch and {0 if alone is None else alone.num_frames} alone"
    else:
        kl_T = distance(padded, alone).kl_ab_T
        frame = int(kl_T.argmax())
        if kl_T[frame] <= _PADDING_KL:
            return
        found = f"other posteriors in a batch than alone (KL {kl_T[frame]:.2g} nats in frame {frame} of {len(kl_T)})"
    raise InputError(
        f"utterance {ids[row]} has {found}: a teacher hears what its input is padded with. Mask attention, normalisation and "
        "convolutions beyond the lengths (teacher_service/README.md, Teachers), or set a resources.batch_seconds below the "
        "shortest utterance, so that each is labelled by itself"
    )


def _sample(job: PreparedJob, teachers: list[Teacher], num_batches: int) -> tuple[Corpus, float]:
    """The utterances to label, in corpus order, and the padding of the shards that they are from."""
    wanted = num_batches * job.document.storage.batch_seconds
    # Shards may be smaller than a batch: as many as hold the sample.
    needed = math.ceil(wanted / (sum(job.seconds_of_shard) / len(job.plan)))
    num_shards = min(len(job.plan), max(needed, min(num_batches, _MAX_SHARDS)))
    chosen = np.unique(np.linspace(0, len(job.plan) - 1, num_shards).round().astype(int))
    wanted /= len(chosen)
    rng, parts = np.random.default_rng(0), []
    speech, padded = 0.0, 0.0
    for index in chosen:
        shard = job.plan[index]
        rows = job.corpus.read(shard.first_row, shard.num_rows)
        seconds = rows.seconds()
        speech += float(seconds.sum())
        padded += sum(float(seconds[batch].max() * len(batch)) for batch in _batches(job, rows, teachers))
        order = rng.permutation(len(rows))
        # Up to the utterance that fills it, and at least one.
        parts.append(rows.where(_mask(len(rows), order[np.cumsum(seconds[order]) - seconds[order] < wanted])).table)
    return rows.with_table(pa.concat_tables(parts)), padded / speech


def _batches(job: PreparedJob, rows: Corpus, teachers: list[Teacher]) -> list[list[int]]:
    spec, storage = job.document.spec, job.document.storage
    return [batch for batch, _ in batches_of(rows, teachers, spec.num_folds, storage.batch_seconds)]


def _mask(length: int, rows: Sequence[int] | np.ndarray) -> np.ndarray:
    mask = np.zeros(length, dtype=bool)
    mask[rows] = True
    return mask


def _label(
    job: PreparedJob, rows: Corpus, teachers: list[Teacher], on_batch: Callable[[BatchDone], None] = lambda _: None
) -> LabelledShard:
    return label_shard(rows, teachers, job.document.spec, job.document.storage, on_batch=on_batch)


def _encoded_bytes(job: PreparedJob, utterances: list[LabelledUtterance]) -> tuple[int, dict[str, bytes]]:
    """All that is stored of a shard: its files, its commit record, its part of the manifest and of the utterance index; nothing
    where nothing was labelled."""
    num = len(utterances)
    if not num:
        return 0, {}
    files, record = encode_shard(job.document, ShardRange(index=0, first_row=0, num_rows=num), utterances, [])
    in_manifest = len(canonical_json(record.shard.model_dump(mode="json")))
    num_bytes = sum(map(len, files.values())) + len(to_bytes(record)) + in_manifest + num * ENTRY.itemsize
    return num_bytes, files


def _memory(utterance: LabelledUtterance) -> int:
    targets = utterance.targets
    return targets.offsets.nbytes + targets.class_ids.nbytes + targets.log_probs.nbytes + targets.tail_mass.nbytes


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts KiB, macOS bytes.
    return peak if sys.platform == "darwin" else peak << 10
