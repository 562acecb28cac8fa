"""Random frames, and the soft loss by its definition: dense, in float64."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from student_trainer.batch import sparse_targets
from student_trainer.config import TailMode
from student_trainer.loss import SparseTargets
from tests.support.targets import random_log_posterior, targets_from_dense

TAIL_MODES: tuple[TailMode, ...] = get_args(TailMode)
TEMPERATURES = (1.0, 2.0)
seeds = st.integers(0, 2**32 - 1)


def random_case(seed: int, *, num_classes: int, max_entries: int, num_frames: int = 6) -> dict[str, Any]:
    """Posteriors [N, V], which classes are kept (some frames none, some all that is allowed), labels, logits."""
    rng = np.random.default_rng(seed)
    log_posterior_NV = random_log_posterior(rng, num_frames, num_classes, scale=2.0)
    counts_N = rng.integers(0, min(max_entries, num_classes), num_frames, endpoint=True)
    kept_NV = rng.random(log_posterior_NV.shape).argsort(axis=1) < counts_N[:, None]
    return {
        "log_posterior_NV": log_posterior_NV,
        "kept_NV": kept_NV,
        "labels_N": torch.from_numpy(rng.integers(-1, num_classes, num_frames)),
        "logits_NV": torch.from_numpy(rng.standard_normal((num_frames, num_classes))).requires_grad_(),
    }


def sparse(case: dict[str, Any], temperature: float) -> SparseTargets:
    stored = targets_from_dense(case["log_posterior_NV"], case["kept_NV"], TEMPERATURES)
    return sparse_targets(stored, temperature)


def as_float64(targets: SparseTargets) -> SparseTargets:
    return SparseTargets(ids_NK=targets.ids_NK, probs_NK=targets.probs_NK.double(), tail_N=targets.tail_N.double())


def dense_loss(
    logits_NV: Tensor,
    probs_NV: Tensor,
    kept_NV: Tensor,
    tail_N: Tensor,
    labels_N: Tensor,
    temperature: float,
    tail: str,
    weights_N: Tensor | None = None,
) -> Tensor:
    """The definition, frame by frame, with a target over all classes. ``probs_NV`` is 0 where nothing is kept."""
    num_classes = logits_NV.shape[1]
    losses = []
    for logits_V, probs_V, kept_V, mass, label in zip(
        logits_NV, probs_NV, kept_NV, tail_N, labels_N.tolist(), strict=True
    ):
        student_V = (logits_V / temperature).softmax(dim=-1)
        target_V = probs_V.clone()
        if not kept_V.any():
            losses.append(0 * student_V.sum())
            continue
        if tail == "ghost":
            if not kept_V.all():
                student_V = torch.cat([student_V[kept_V], student_V[~kept_V].sum()[None]])
                target_V = torch.cat([probs_V[kept_V], mass[None]])
        elif tail == "renormalize" or (tail == "to_hard_label" and label < 0):
            target_V = target_V / target_V.sum()
        elif tail == "to_hard_label":
            target_V[label] += mass
        else:
            target_V[~kept_V] = mass / max(num_classes - int(kept_V.sum()), 1)
        losses.append(-(target_V * student_V.log()).sum())
    losses_N = torch.stack(losses)
    return (losses_N if weights_N is None else weights_N * losses_N).mean() * temperature**2


def value_and_gradient(loss: Tensor, logits_NV: Tensor) -> tuple[float, Tensor]:
    (gradient_NV,) = torch.autograd.grad(loss, logits_NV)
    return float(loss.detach()), gradient_NV


def dense_targets(targets: SparseTargets, kept_NV: Tensor) -> Tensor:
    return torch.zeros(kept_NV.shape, dtype=torch.float64).scatter_add(1, targets.ids_NK, targets.probs_NK.double())
