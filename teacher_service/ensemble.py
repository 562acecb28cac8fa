"""Ensemble: the teachers' logits -> one posterior.

"arithmetic" is the mean of the posteriors, "log_linear" their normalised weighted geometric mean (a product of experts).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor


def combine(logits: Sequence[Tensor], weights: Sequence[float], method: Literal["arithmetic", "log_linear"]) -> Tensor:
    """Log-posterior of the ensemble, float32 [B, T, V].

    Args:
        logits: of each teacher, [B, T, V].
        weights: positive, adding up to 1.
    """
    combined: Tensor | None = None
    for logits_BTV, weight in zip(logits, weights, strict=True):
        log_probs_BTV = logits_BTV.float().log_softmax(dim=-1)
        if method == "arithmetic":
            weighted = log_probs_BTV + math.log(weight)
            combined = weighted if combined is None else torch.logaddexp(combined, weighted)
        else:
            weighted = log_probs_BTV * weight
            combined = weighted if combined is None else combined + weighted
    assert combined is not None
    return combined.log_softmax(dim=-1) if method == "log_linear" else combined


def disagreements(lengths: Sequence[Tensor], names: Sequence[str]) -> dict[int, str]:
    """The utterances of a batch for which teachers give different numbers of frames, and what they give.

    Args:
        lengths: of each teacher, int64 [B].
    """
    first_B, found = lengths[0].tolist(), dict[int, str]()
    for other, name in zip(lengths[1:], names[1:], strict=True):
        for row, (expected, length) in enumerate(zip(first_B, other.tolist(), strict=True)):
            if length != expected and row not in found:
                found[row] = f"teachers disagree on its frames: '{names[0]}' gives {expected}, '{name}' {length}"
    return found
