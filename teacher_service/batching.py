"""Deterministic batches: utterances of like length together, padded to the longest.

The batches of a shard are a function of its durations, so that a shard made again is padded, and hence rounded, alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def batch_rows(seconds_N: npt.NDArray[np.floating], batch_seconds: float) -> list[list[int]]:
    """Rows of each batch, longest utterances first (memory runs out at once or never).

    A batch's padded speech is at most ``batch_seconds``, or it is one utterance.
    """
    batches: list[list[int]] = []
    for row in np.argsort(-seconds_N, kind="stable"):
        longest = seconds_N[batches[-1][0]] if batches else 0.0
        if not batches or longest * (len(batches[-1]) + 1) > batch_seconds:
            batches.append([])
        batches[-1].append(int(row))
    return batches


def batch_rows_by_fold(
    seconds_N: npt.NDArray[np.floating], fold_N: npt.NDArray[np.integer], batch_seconds: float
) -> list[list[int]]:
    """As :func:`batch_rows`, each batch of one fold: its teachers run on nobody else's speech."""
    batches: list[list[int]] = []
    for fold in np.unique(fold_N):
        rows = np.flatnonzero(fold_N == fold)
        batches += [[int(rows[row]) for row in batch] for batch in batch_rows(seconds_N[rows], batch_seconds)]
    return batches


def pad(features: Sequence[npt.NDArray[np.float32]]) -> tuple[Tensor, Tensor]:
    """features_BTD float32, zero-padded, and lengths_B int64."""
    lengths = [len(feature) for feature in features]
    padded_BTD = np.zeros((len(features), max(lengths), features[0].shape[1]), dtype=np.float32)
    for row, feature in enumerate(features):
        padded_BTD[row, : lengths[row]] = feature
    return torch.from_numpy(padded_BTD), torch.tensor(lengths)
