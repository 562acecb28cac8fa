"""Hard and soft losses, sparse: no [frames x classes] target is ever made.

Shape suffixes: N frames (valid ones, of all utterances of a batch), V classes, K kept entries (padded with probability 0),
C chosen classes: the kept ones and the hard label.

With teacher posterior p, student posterior s at the same temperature and tail mass m = 1 - sum of kept p, the soft loss is
the cross-entropy between p and s; the teacher's entropy, a constant, is left out. What stands for the tail:

* ``renormalize``: nothing; p is divided by its kept sum. Biased: the student becomes too sharp.
* ``ghost``: one further class holds all that was not kept, in teacher and student alike (the loss is the KL after
  merging the classes outside; no assumption about how the tail is spread).
* ``to_hard_label``: the tail goes to the frame's hard label; a frame without one is renormalised.
* ``uniform``: the tail is spread evenly over the classes that were not kept.

The hard loss is a mean over the labelled frames of a batch, the soft loss one over all its frames. So hard and soft gradient
stand as (1 - weight) to weight in every batch that has a label, whatever share of the speech is labelled: ``weight`` means the
same with hard labels on a tenth of the corpus as on all of it. (Divided by all frames, the hard loss would fade with that
share.) The price: a labelled frame counts for more in a batch with few of them, and a batch without any teaches by its soft
loss alone.

All tail modes need of a frame's logits the chosen ones and the logsumexp of those that were not kept. Where the temperature
is 1 and the output layer is shared, so does the hard loss: a step with both normalises once, like a step with the hard loss
alone. Logits of half precision are taken in single precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from student_trainer.config import TailMode


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseTargets:
    """Targets of N frames at one temperature.

    Attributes:
        ids_NK: int64.
        probs_NK: float32; 0 where a frame has fewer than K entries.
        tail_N: float32.
        weights_N: float32, what each frame's loss is multiplied by; None: 1.
    """

    ids_NK: Tensor
    probs_NK: Tensor
    tail_N: Tensor
    weights_N: Tensor | None = None


def hard_loss(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Mean cross-entropy over the frames that have a label (-1: none); 0 where no frame has one."""
    loss = functional.cross_entropy(_at_least_single(logits_NV), labels_N, ignore_index=-1, reduction="sum")
    return loss / (labels_N >= 0).sum().clamp(min=1)


def soft_loss(
    logits_NV: Tensor, targets: SparseTargets, *, temperature: float, tail: TailMode, labels_N: Tensor
) -> Tensor:
    """Mean soft cross-entropy over frames, times temperature squared (Hinton et al., 2015).

    Frames without any entry count as frames but add nothing, and so do frames of weight 0: the loss is sum(w_n loss_n) / N. To
    drop frames at reading is then what dropping their entries at labelling would have been, and what one frame teaches does
    not depend on which others are dropped; divided by the sum of the weights, the few frames that are left of a batch would
    stand for all of it.
    """
    student = _log_posterior(logits_NV, targets, labels_N, temperature, tail)
    return _cross_entropy(student, targets, labels_N, tail) * temperature**2


def hard_and_soft_loss(
    hard_NV: Tensor, soft_NV: Tensor, targets: SparseTargets, *, temperature: float, tail: TailMode, labels_N: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`hard_loss` of the logits of the first head, :func:`soft_loss` of those of the last, which may be the same."""
    if hard_NV is soft_NV:
        # Once, so that the gradients of the two are added in single precision, too.
        hard_NV = soft_NV = _at_least_single(soft_NV)
    if hard_NV is not soft_NV or temperature != 1:
        soft = soft_loss(soft_NV, targets, temperature=temperature, tail=tail, labels_N=labels_N)
        return hard_loss(hard_NV, labels_N), soft
    student = _log_posterior(soft_NV, targets, labels_N, temperature, tail)
    has_label_N = labels_N >= 0
    hard = -(student.label_N * has_label_N).sum() / has_label_N.sum().clamp(min=1)
    return hard, _cross_entropy(student, targets, labels_N, tail)


def _at_least_single(logits_NV: Tensor) -> Tensor:
    """Logits in float16 or bfloat16, as autocast gives them, in float32: sums over classes and frames need it, and on a GPU
    autocast makes softmax float32, whose gradient cannot be added to in half precision."""
    return logits_NV.float() if logits_NV.dtype in (torch.float16, torch.bfloat16) else logits_NV


@dataclass(frozen=True, slots=True, kw_only=True)
class _LogPosterior:
    """The student's, at the temperature of the targets.

    Attributes:
        kept_NK: of the kept classes; of any class where the target is padding.
        label_N: of the hard label; of any class where there is none.
        outside_N: what the tail is weighed against: for ``uniform`` the mean over the classes that were not kept, otherwise
            of all of them as one class; 0 where there is none.
    """

    kept_NK: Tensor
    label_N: Tensor
    outside_N: Tensor


def _log_posterior(
    logits_NV: Tensor, targets: SparseTargets, labels_N: Tensor, temperature: float, tail: TailMode
) -> _LogPosterior:
    logits_NV = _at_least_single(logits_NV)
    is_kept_NK = targets.probs_NK > 0
    # A frame without entries keeps its first id, with probability 0: what is normalised over stays all classes.
    is_kept_NK[:, 0] = True
    ids_NK = torch.where(is_kept_NK, targets.ids_NK, targets.ids_NK[:, :1])
    chosen_NC, outside_N, sum_N = _ChosenAndOutside.apply(  # type: ignore[no-untyped-call]
        logits_NV, ids_NK, labels_N.clamp(min=0), temperature, tail == "uniform"
    )
    kept_NK = chosen_NC[:, :-1]
    log_norm_N = torch.logaddexp(kept_NK.masked_fill(~is_kept_NK, -torch.inf).logsumexp(dim=1), outside_N)
    num_outside_N = logits_NV.shape[1] - is_kept_NK.sum(dim=1)
    if tail == "uniform":
        outside_N = (sum_N - (kept_NK * is_kept_NK).sum(dim=1)) / num_outside_N.clamp(min=1)
    return _LogPosterior(
        kept_NK=kept_NK - log_norm_N[:, None],
        label_N=chosen_NC[:, -1] - log_norm_N,
        outside_N=torch.where(num_outside_N > 0, outside_N - log_norm_N, 0.0),
    )


def _cross_entropy(student: _LogPosterior, targets: SparseTargets, labels_N: Tensor, tail: TailMode) -> Tensor:
    kept_N = targets.probs_NK.sum(dim=1)
    loss_N = -(targets.probs_NK * student.kept_NK).sum(dim=1)
    if tail == "renormalize":
        loss_N = loss_N / kept_N.clamp(min=1e-20)
    elif tail == "to_hard_label":
        renormalized_N = loss_N / kept_N.clamp(min=1e-20)
        loss_N = torch.where(labels_N >= 0, loss_N - targets.tail_N * student.label_N, renormalized_N)
    else:
        loss_N = loss_N - targets.tail_N * student.outside_N
    loss_N = torch.where(kept_N > 0, loss_N, 0.0)
    return loss_N.mean() if targets.weights_N is None else (targets.weights_N * loss_N).mean()


class _ChosenAndOutside(torch.autograd.Function):
    """All that the losses need of the logits (over the temperature): those of the kept ids and the label [N, K + 1], the
    logsumexp of those that were not kept [N] (-inf where all were), and, if asked for, the sum of all [N].

    Not log(1 - sum of the kept posterior), which is rounding where the student leaves little outside. It costs one copy of the
    logits, freed at once, and their softmax, which becomes the gradient. A cross-entropy has three tensors of that size: the
    log-softmax, and the gradients of it and of the logits.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, ids_NK: Tensor, labels_N: Tensor, temperature: float, with_sum: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        chosen_NC = torch.cat([ids_NK, labels_N[:, None]], dim=1)
        outside_NV = logits_NV / temperature if temperature != 1 else logits_NV.clone()
        logits_NC = outside_NV.gather(1, chosen_NC)
        sum_N = outside_NV.sum(dim=1) if with_sum else None
        outside_NV.scatter_(1, ids_NK, -torch.inf)
        softmax_NV = outside_NV.softmax(dim=1)
        # The largest probability is at least 1 / V: its logarithm loses nothing.
        log_outside_N = outside_NV.amax(dim=1) - softmax_NV.amax(dim=1).log()
        if ids_NK.shape[1] >= logits_NV.shape[1]:
            # All classes of a frame may be kept, which makes its softmax 0 / 0.
            softmax_NV.nan_to_num_(0.0)
            log_outside_N.nan_to_num_(-torch.inf)
        ctx.save_for_backward(softmax_NV, chosen_NC)
        ctx.temperature = temperature
        return logits_NC, log_outside_N, sum_N

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_NC: Tensor, grad_outside_N: Tensor, grad_sum_N: Tensor | None
    ) -> tuple[Tensor, None, None, None, None]:
        softmax_NV, chosen_NC = ctx.saved_tensors
        # In place: torch refuses a second backward pass through it, as for any saved tensor that was changed.
        grad_NV = softmax_NV.mul_(grad_outside_N[:, None] / ctx.temperature)
        if grad_sum_N is not None:
            grad_NV.add_(grad_sum_N[:, None] / ctx.temperature)
        return grad_NV.scatter_add_(1, chosen_NC, grad_NC / ctx.temperature), None, None, None, None
