"""Hard and soft losses, sparse: no [frames x classes] target is ever made.

Shape suffixes: N frames (valid ones, of all utterances of a batch), V classes, K kept entries (padded with log-prob -inf).

With teacher posterior p, student posterior s at the same temperature and tail mass m = 1 - sum of kept p, the soft loss is
the cross-entropy between p and s; the teacher's entropy, a constant, is left out. What stands for the tail:

* ``renormalize``: nothing; p is divided by its kept sum. Biased: the student becomes too sharp.
* ``ghost``: one further class holds all that was not kept, in teacher and student alike (the loss is the KL after
  merging the classes outside; no assumption about how the tail is spread).
* ``to_hard_label``: the tail goes to the frame's hard label; a frame without one is renormalised.
* ``uniform``: the tail is spread evenly over the classes that were not kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from student_trainer.config import TailMode

# Below this 1 - sum of the student's kept classes is float32 rounding, and so would be the gradient of its logarithm.
_MIN_TAIL = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseTargets:
    """Targets of N frames at one temperature.

    Attributes:
        ids_NK: int64.
        probs_NK: float32; 0 where a frame has fewer than K entries.
        tail_N: float32.
    """

    ids_NK: Tensor
    probs_NK: Tensor
    tail_N: Tensor


def hard_loss(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Mean cross-entropy over the frames that have a label (-1: none); 0 where no frame has one."""
    num_labelled = (labels_N >= 0).sum().clamp(min=1)
    return functional.cross_entropy(logits_NV, labels_N, ignore_index=-1, reduction="sum") / num_labelled


def soft_loss(
    logits_NV: Tensor, targets: SparseTargets, *, temperature: float, tail: TailMode, labels_N: Tensor
) -> Tensor:
    """Mean soft cross-entropy over frames, times temperature squared (Hinton et al., 2015).

    Frames without any entry count as frames but add nothing.
    """
    scaled_NV = logits_NV / temperature
    log_norm_N1 = scaled_NV.logsumexp(dim=-1, keepdim=True)
    log_student_NK = scaled_NV.gather(1, targets.ids_NK) - log_norm_N1
    probs_NK = targets.probs_NK
    kept_N = probs_NK.sum(dim=-1)
    if tail == "renormalize":
        loss_N = -(probs_NK * log_student_NK).sum(dim=-1) / kept_N.clamp(min=1e-20)
    else:
        loss_N = -(probs_NK * log_student_NK).sum(dim=-1)
        if tail == "ghost":
            student_kept_N = (log_student_NK.exp() * (probs_NK > 0)).sum(dim=-1)
            loss_N = loss_N - targets.tail_N * torch.log((1 - student_kept_N).clamp(min=_MIN_TAIL))
        elif tail == "to_hard_label":
            has_label_N = labels_N >= 0
            log_label_N = (scaled_NV.gather(1, labels_N.clamp(min=0)[:, None]) - log_norm_N1).squeeze(1)
            renormalized_N = loss_N / kept_N.clamp(min=1e-20)
            loss_N = torch.where(has_label_N, loss_N - targets.tail_N * log_label_N, renormalized_N)
        else:
            num_outside_N = logits_NV.shape[1] - (probs_NK > 0).sum(dim=-1)
            all_N = scaled_NV.sum(dim=-1) - logits_NV.shape[1] * log_norm_N1.squeeze(1)
            outside_N = all_N - (log_student_NK * (probs_NK > 0)).sum(dim=-1)
            loss_N = loss_N - targets.tail_N * outside_N / num_outside_N.clamp(min=1)
        loss_N = torch.where(kept_N > 0, loss_N, torch.zeros_like(loss_N))
    return loss_N.mean() * temperature**2
