"""What a student is fed: features, hard labels and soft targets, joined by utterance id, in a reproducible order.

::

    corpus rows -> epoch_pools(seed, epoch) -> pool -> batches of rows -> collate -> Batch

The order is a function of durations, seed and epoch alone: the same with and without soft labels, and on every machine.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from softlabel_schemas.corpus import Corpus, Utterance
from softlabel_schemas.dataset import SoftLabelDataset
from softlabel_schemas.errors import InputError
from softlabel_schemas.front_end import Fbank, Precomputed, UtteranceReader
from softlabel_schemas.selection import NO_LABEL, check_derivable, narrow
from softlabel_schemas.targets import SoftTargets, concatenate
from student_trainer.config import SoftLabelConfig
from student_trainer.loss import SparseTargets

# A pool is made of this many runs of consecutive rows, so that it touches few shards.
_BLOCKS_PER_POOL = 8
# Random change of the lengths that batches are sorted by: neighbours in length, but not the same ones every epoch.
_LENGTH_JITTER = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One utterance: features float32 [T, D], hard labels int64 [T] or None, soft targets or None."""

    utterance_id: str
    features: npt.NDArray[np.float32]
    hard_labels: npt.NDArray[np.int64] | None
    soft: SoftTargets | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """B utterances; N is the sum of their label frames, in order.

    Attributes:
        features_BTD: float32, zero-padded; lengths_B int64.
        labels_N: int64, -1 where a frame has no hard label; label_lengths_B int64.
        targets: soft targets of the N frames, or None.
    """

    utterance_ids: tuple[str, ...]
    features_BTD: Tensor
    lengths_B: Tensor
    labels_N: Tensor
    label_lengths_B: Tensor
    targets: SparseTargets | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Speech that is shuffled together.

    Attributes:
        batches: corpus rows of each batch.
        first_step: position of the first batch in its epoch, which has ``num_steps`` in all.
        examples: by corpus row.
    """

    epoch: int
    batches: list[list[int]]
    first_step: int
    num_steps: int
    examples: dict[int, Example] = field(default_factory=dict)

    @property
    def ends_epoch(self) -> bool:
        return self.first_step + len(self.batches) == self.num_steps


class SoftLabels:
    """The published targets of a corpus, at one temperature and selection.

    Raises:
        InputError: the dataset does not fit the corpus or cannot give what is asked; both values are named.
    """

    def __init__(
        self, dataset: SoftLabelDataset, config: SoftLabelConfig, corpus: Corpus, inventory_digest: str
    ) -> None:
        spec = dataset.manifest.spec
        if spec.inventory_digest != inventory_digest:
            raise InputError(
                f"{dataset.store.url}: labels are of class inventory {spec.inventory_digest[:12]} "
                f"({spec.num_classes} classes), the student's is {inventory_digest[:12]}"
            )
        shift = corpus.hard_label_frame_shift_ms
        if shift is not None and shift != spec.frame_shift_ms:
            raise InputError(
                f"{dataset.store.url}: frame shift of the soft targets is {spec.frame_shift_ms:g} ms, "
                f"of the hard labels {shift:g} ms"
            )
        if config.temperature not in spec.temperatures:
            raise InputError(
                f"{dataset.store.url}: temperature {config.temperature:g} is asked for, "
                f"tails are stored for {', '.join(f'{t:g}' for t in spec.temperatures)}"
            )
        if config.selection is not None:
            check_derivable(spec.selection, config.selection)
        self.dataset, self.config = dataset, config

    def of(self, utterances: Sequence[Utterance]) -> list[SoftTargets]:
        """Targets in the order of ``utterances``; each is joined by id, a missing one or another length raises."""
        try:
            stored = self.dataset.read_utterances([utterance.utterance_id for utterance in utterances])
        except KeyError as error:
            raise InputError(f"no soft targets for utterance {error.args[0]}") from None
        found = []
        for utterance, labelled in zip(utterances, stored, strict=True):
            targets = labelled.targets
            labels = utterance.hard_labels
            if labels is not None and len(labels) != targets.num_frames:
                raise InputError(
                    f"utterance {utterance.utterance_id}: {targets.num_frames} frames of soft targets, "
                    f"{len(labels)} of hard labels"
                )
            if self.config.selection is not None:
                no_labels = np.full(targets.num_frames, NO_LABEL)
                targets = narrow(targets, self.config.selection, no_labels if labels is None else labels)
            found.append(targets)
        return found


class TrainingData:
    """Examples of a corpus, read on demand or kept in memory."""

    def __init__(self, corpus: Corpus, front_end: Fbank | Precomputed, soft_labels: SoftLabels | None) -> None:
        self.corpus, self.front_end, self.soft_labels = corpus, front_end, soft_labels
        self._reader = UtteranceReader(corpus)

    @cached_property
    def seconds_N(self) -> npt.NDArray[np.float64]:
        return self.corpus.seconds()

    def load(self, rows: Sequence[int], given_up: threading.Event | None = None) -> dict[int, Example]:
        """Examples by row. Rows are read in order, so that each shard of soft targets is decoded once.

        Args:
            given_up: once set, the rest is left out: nobody waits for it any more.
        """
        ordered = sorted(rows)
        utterances = [self.corpus[row] for row in ordered]
        soft = self.soft_labels.of(utterances) if self.soft_labels else [None] * len(utterances)
        examples = {}
        for row, utterance, targets in zip(ordered, utterances, soft, strict=True):
            if given_up is not None and given_up.is_set():
                break
            labels = utterance.hard_labels
            if labels is None and targets is None:
                raise InputError(f"utterance {utterance.utterance_id} has neither hard labels nor soft targets")
            examples[row] = Example(
                utterance_id=utterance.utterance_id,
                features=self._reader.features(utterance, [self.front_end])[0],
                hard_labels=None if labels is None else labels.astype(np.int64),
                soft=targets,
            )
        return examples

    def pools(
        self, *, seed: int, first_epoch: int, num_epochs: int, batch_seconds: float, pool_seconds: float
    ) -> Iterator[Pool]:
        """The pools of the epochs, in order; the next one is loaded while one is used."""
        plans = (
            plan
            for epoch in range(first_epoch, num_epochs)
            for plan in _plan_epoch(
                self.seconds_N, seed=seed, epoch=epoch, batch_seconds=batch_seconds, pool_seconds=pool_seconds
            )
        )
        if self.seconds_N.sum() <= pool_seconds:
            everything = self.load(range(len(self.corpus)))
            yield from (replace(plan, examples=everything) for plan in plans)
            return
        loader, given_up = ThreadPoolExecutor(max_workers=1), threading.Event()
        try:
            coming: tuple[Pool, Future[dict[int, Example]]] | None = None
            for plan in plans:
                waiting, coming = (
                    coming,
                    (plan, loader.submit(self.load, [row for rows in plan.batches for row in rows], given_up)),
                )
                if waiting is not None:
                    yield replace(waiting[0], examples=waiting[1].result())
            if coming is not None:
                yield replace(coming[0], examples=coming[1].result())
        finally:
            # Not waited for: whoever gives up has a checkpoint to write first.
            given_up.set()
            loader.shutdown(wait=False, cancel_futures=True)


def _plan_epoch(
    seconds_N: npt.NDArray[np.float64], *, seed: int, epoch: int, batch_seconds: float, pool_seconds: float
) -> Iterator[Pool]:
    pools = epoch_pools(seconds_N, seed=seed, epoch=epoch, batch_seconds=batch_seconds, pool_seconds=pool_seconds)
    num_steps, first_step = sum(map(len, pools)), 0
    for batches in pools:
        yield Pool(epoch=epoch, batches=batches, first_step=first_step, num_steps=num_steps)
        first_step += len(batches)


def epoch_pools(
    seconds_N: npt.NDArray[np.float64], *, seed: int, epoch: int, batch_seconds: float, pool_seconds: float
) -> list[list[list[int]]]:
    """Pools of batches of rows, every row once: a function of its arguments alone."""
    rng = np.random.default_rng([seed, epoch])
    block_of_N = np.floor((np.cumsum(seconds_N) - seconds_N) / (pool_seconds / _BLOCKS_PER_POOL)).astype(np.int64)
    blocks = np.split(np.arange(len(seconds_N)), np.flatnonzero(np.diff(block_of_N)) + 1)
    order = rng.permutation(len(blocks))
    pools = [
        np.concatenate([blocks[index] for index in order[start : start + _BLOCKS_PER_POOL]])
        for start in range(0, len(blocks), _BLOCKS_PER_POOL)
    ]
    return [_batches(pool, seconds_N, batch_seconds, rng) for pool in pools]


def _batches(
    rows: npt.NDArray[np.int64], seconds_N: npt.NDArray[np.float64], batch_seconds: float, rng: np.random.Generator
) -> list[list[int]]:
    jitter = rng.uniform(1 - _LENGTH_JITTER, 1 + _LENGTH_JITTER, len(rows))
    batches: list[list[int]] = [[]]
    longest = 0.0
    for row in rows[np.argsort(seconds_N[rows] * jitter, kind="stable")]:
        longest = max(longest, seconds_N[row])
        if batches[-1] and longest * (len(batches[-1]) + 1) > batch_seconds:
            batches.append([])
            longest = seconds_N[row]
        batches[-1].append(int(row))
    return [batches[index] for index in rng.permutation(len(batches))]


def collate(examples: Sequence[Example], *, temperature: float = 1.0) -> Batch:
    """Pad features, join label frames."""
    lengths = [len(example.features) for example in examples]
    num_features = examples[0].features.shape[1]
    features_BTD = np.zeros((len(examples), max(lengths), num_features), dtype=np.float32)
    for row, example in enumerate(examples):
        features_BTD[row, : lengths[row]] = example.features
    labels, label_lengths = [], []
    for example in examples:
        if example.hard_labels is not None:
            labels.append(example.hard_labels)
        else:
            assert example.soft is not None
            labels.append(np.full(example.soft.num_frames, NO_LABEL, dtype=np.int64))
        label_lengths.append(len(labels[-1]))
    soft = [example.soft for example in examples if example.soft is not None]
    return Batch(
        utterance_ids=tuple(example.utterance_id for example in examples),
        features_BTD=torch.from_numpy(features_BTD),
        lengths_B=torch.tensor(lengths),
        labels_N=torch.from_numpy(np.concatenate(labels)),
        label_lengths_B=torch.tensor(label_lengths),
        targets=sparse_targets(concatenate(soft), temperature) if soft else None,
    )


def sparse_targets(targets: SoftTargets, temperature: float) -> SparseTargets:
    """Pad the ragged entries to [N, K] tensors at ``temperature``."""
    log_probs_E, tail_N = targets.at_temperature(temperature)
    counts_N = targets.counts_T
    mask_NK = np.arange(int(counts_N.max(initial=1))) < counts_N[:, None]
    ids_NK = np.zeros(mask_NK.shape, dtype=np.int64)
    probs_NK = np.zeros(mask_NK.shape, dtype=np.float32)
    ids_NK[mask_NK] = targets.class_ids
    probs_NK[mask_NK] = np.exp(log_probs_E)
    return SparseTargets(
        ids_NK=torch.from_numpy(ids_NK),
        probs_NK=torch.from_numpy(probs_NK),
        tail_N=torch.from_numpy(tail_N.copy()),
    )
