"""Ensemble: the teachers' logits -> one posterior.

"arithmetic" is the mean of the posteriors, "log_linear" their normalised weighted geometric mean (a product of experts).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from softlabel_schemas.errors import InputError


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


def check_same_lengths(lengths: Sequence[Tensor], names: Sequence[str]) -> None:
    """Raises InputError where teachers of one ensemble give different numbers of frames; names both."""
    for other, name in zip(lengths[1:], names[1:], strict=True):
        if not torch.equal(other.cpu(), lengths[0].cpu()):
            row = int(torch.nonzero(other.cpu() != lengths[0].cpu())[0])
            raise InputError(
                f"teachers disagree on the frames of an utterance: '{names[0]}' gives {int(lengths[0][row])}, "
                f"'{name}' {int(other[row])}"
            )
