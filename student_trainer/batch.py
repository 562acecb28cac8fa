"""A batch: ragged utterances -> padded tensors. It is made by the loader's thread, so it is all numpy, whose copies need no
threads of torch's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from softlabel_schemas.selection import NO_LABEL
from softlabel_schemas.targets import SoftTargets, concatenate
from student_trainer.loss import SparseTargets

BatchT = TypeVar("BatchT", "Batch", "TokenTargets", SparseTargets)


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One utterance: features float32 [T, D], hard labels int64 [T] or None, soft targets or None, and of these the weights of
    their frames, float32 [T], or None (1); or tokens of its transcript, int64 [L], in place of hard labels."""

    utterance_id: str
    features: npt.NDArray[np.float32]
    hard_labels: npt.NDArray[np.int64] | None
    soft: SoftTargets | None
    frame_weights: npt.NDArray[np.float32] | None = None
    tokens: npt.NDArray[np.int64] | None = None

    @property
    def num_labels(self) -> int:
        """Frames of hard labels, or without them of soft targets, or of features."""
        if self.hard_labels is not None:
            return len(self.hard_labels)
        return len(self.features) if self.soft is None else self.soft.num_frames


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTargets:
    """Transcripts of the utterances of a batch.

    Attributes:
        tokens_L: of all of them joined, int64.
        lengths_B: int64; -1 for an utterance without a transcript.
        min_frames_B: that CTC needs, int64; 0 without a transcript.
    """

    tokens_L: Tensor
    lengths_B: Tensor
    min_frames_B: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """B utterances; N is the sum of their label frames, in order.

    Attributes:
        features_BTD: float32, zero-padded; lengths_B int64.
        labels_N: int64, -1 where a frame has no hard label; label_lengths_B int64.
        targets: soft targets of the N frames, or None.
        tokens: with CTC.
    """

    utterance_ids: tuple[str, ...]
    features_BTD: Tensor
    lengths_B: Tensor
    labels_N: Tensor
    label_lengths_B: Tensor
    targets: SparseTargets | None
    tokens: TokenTargets | None = None

    def to(self, device: torch.device) -> Batch:
        """The same on ``device``. Copies to a GPU start from pinned memory and are not waited for: what is computed there next
        comes after them."""
        if device.type == "cpu":
            return self
        pins = device.type == "cuda"
        return self.map(lambda tensor: (tensor.pin_memory() if pins else tensor).to(device, non_blocking=True))

    def map(self, function: Callable[[Any], Any]) -> Batch:
        """With ``function`` of each tensor (or of each array, where an earlier one made arrays of them) in its place."""
        targets = None if self.targets is None else _mapped(self.targets, function)
        tokens = None if self.tokens is None else _mapped(self.tokens, function)
        return _mapped(replace(self, targets=targets, tokens=tokens), function)


def collate(examples: Sequence[Example], *, temperature: float = 1.0) -> Batch:
    """Pad features, join label frames."""
    # A copy for each utterance takes half as long as one through a mask of all frames.
    lengths = [len(example.features) for example in examples]
    num_features = examples[0].features.shape[1]
    features_BTD = np.zeros((len(examples), max(lengths), num_features), dtype=np.float32)
    for row, example in enumerate(examples):
        features_BTD[row, : lengths[row]] = example.features
    labels, label_lengths = [], []
    for example in examples:
        labels_T = example.hard_labels
        labels.append(np.full(example.num_labels, NO_LABEL, dtype=np.int64) if labels_T is None else labels_T)
        label_lengths.append(len(labels[-1]))
    soft = [example.soft for example in examples if example.soft is not None]
    weights = [example.frame_weights for example in examples if example.frame_weights is not None]
    return Batch(
        utterance_ids=tuple(example.utterance_id for example in examples),
        features_BTD=torch.from_numpy(features_BTD),
        lengths_B=torch.tensor(lengths),
        labels_N=torch.from_numpy(np.concatenate(labels)),
        label_lengths_B=torch.tensor(label_lengths),
        targets=sparse_targets(concatenate(soft), temperature, np.concatenate(weights) if weights else None)
        if soft
        else None,
        tokens=_token_targets([example.tokens for example in examples]),
    )


def _token_targets(tokens: Sequence[npt.NDArray[np.int64] | None]) -> TokenTargets | None:
    given = [own_L for own_L in tokens if own_L is not None]
    if not given:
        return None
    return TokenTargets(
        tokens_L=torch.from_numpy(np.concatenate(given)),
        lengths_B=torch.tensor([-1 if own_L is None else len(own_L) for own_L in tokens]),
        min_frames_B=torch.tensor([0 if own_L is None else min_ctc_frames(own_L) for own_L in tokens]),
    )


def min_ctc_frames(tokens_L: npt.NDArray[np.integer]) -> int:
    """Frames that an alignment of these tokens needs: one each, and a blank between equal neighbours."""
    return len(tokens_L) + int((tokens_L[1:] == tokens_L[:-1]).sum())


def _mapped(value: BatchT, function: Callable[[Any], Any]) -> BatchT:
    """The dataclass with all tensors, or arrays, in it mapped."""
    found = {field.name: getattr(value, field.name) for field in fields(value)}
    return replace(
        value, **{name: function(each) for name, each in found.items() if isinstance(each, Tensor | np.ndarray)}
    )


def sparse_targets(
    targets: SoftTargets, temperature: float, weights_N: npt.NDArray[np.float32] | None = None
) -> SparseTargets:
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
        weights_N=None if weights_N is None else torch.from_numpy(weights_N),
    )
