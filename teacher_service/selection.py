"""Selection on the device: log-posteriors -> the few that are kept. Only these leave the device.

The policies are the prefixes of :mod:`softlabel_schemas.selection`. :mod:`softlabel_schemas.narrowing` selects again at read
time; a test holds the two against each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from softlabel_schemas.selection import MIN_LOG_PROB, NO_LABEL, Mass, PrefixSelection, TopK
from softlabel_schemas.targets import SoftTargets, offsets_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Selected:
    """What is kept of N frames, and what statistics need of the whole posterior.

    Attributes:
        ids_NK: int64, log_probs_NK: float32; ranked; valid where kept_NK.
        tail_NM: float32, at each of M temperatures.
        entropy_N: nats; top1_N: int64, top1_log_prob_N: float32, of the posterior, which a sample may not show.
    """

    ids_NK: Tensor
    log_probs_NK: Tensor
    kept_NK: Tensor
    tail_NM: Tensor
    entropy_N: Tensor
    top1_N: Tensor
    top1_log_prob_N: Tensor

    def to_cpu(self) -> Selected:
        return Selected(**{name: getattr(self, name).cpu() for name in self.__dataclass_fields__})


@torch.inference_mode()
def select(
    log_probs_NV: Tensor, selection: PrefixSelection, temperatures: tuple[float, ...], labels_N: Tensor
) -> Selected:
    """Rank, cut, and take the tail mass as the sum of what is left out (1 - kept would cancel in float32).

    Args:
        log_probs_NV: float32, normalised.
        labels_N: hard labels, int64; -1 where a frame has none.
    """
    num_classes = log_probs_NV.shape[1]
    width = min(selection.cap, num_classes)
    # A stable sort of all classes would break ties by class id but costs ten times top-k; ties are put in order afterwards.
    log_probs_NK, ids_NK = _ranked(log_probs_NV, width)
    # In float64, as at read time: in float32 the running sum reaches the mass an entry early or late in one frame of 70,000,
    # and in one of eight where probabilities are equal.
    kept_NK = prefix(log_probs_NK.double().exp(), selection)
    if selection.keep_hard_label:
        has_label_N = labels_N != NO_LABEL
        label_N1 = labels_N.clamp(min=0)[:, None]
        already_N = (kept_NK & (ids_NK == label_N1)).any(dim=1)
        ids_NK = torch.cat([ids_NK, label_N1], dim=1)
        log_probs_NK = torch.cat([log_probs_NK, log_probs_NV.gather(1, label_N1)], dim=1)
        kept_NK = torch.cat([kept_NK, (has_label_N & ~already_N)[:, None]], dim=1)
    dropped_NV = torch.ones_like(log_probs_NV)
    dropped_NV.scatter_reduce_(1, ids_NK, (~kept_NK).to(dropped_NV.dtype), reduce="amin")
    tails = []
    for temperature in temperatures:
        tempered_NV = log_probs_NV if temperature == 1.0 else (log_probs_NV / temperature).log_softmax(dim=-1)
        tails.append((tempered_NV.exp() * dropped_NV).sum(dim=-1).clamp(0.0, 1.0))
    probs_NV = log_probs_NV.exp()
    return Selected(
        ids_NK=ids_NK,
        log_probs_NK=log_probs_NK.clamp(MIN_LOG_PROB, 0.0),
        kept_NK=kept_NK,
        tail_NM=torch.stack(tails, dim=1),
        entropy_N=-(probs_NV * log_probs_NV.clamp(min=MIN_LOG_PROB)).sum(dim=-1),
        top1_N=ids_NK[:, 0],
        top1_log_prob_N=log_probs_NK[:, 0].clamp(MIN_LOG_PROB, 0.0),
    )


def _ranked(log_probs_NV: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The ``width`` likeliest classes, ties by rising class id."""
    log_probs_NK, ids_NK = log_probs_NV.topk(width, dim=-1)
    # topk leaves the order of equal values open, and which of them it takes at the cut. Frames where the value at the cut
    # occurs outside too are ranked in full; in the others equal neighbours are sorted by id.
    at_cut_N1 = log_probs_NK[:, -1:]
    open_cut_N = (log_probs_NV == at_cut_N1).sum(dim=-1) != (log_probs_NK == at_cut_N1).sum(dim=-1)
    if bool(open_cut_N.any()):
        order = log_probs_NV[open_cut_N].sort(dim=-1, descending=True, stable=True)
        log_probs_NK, ids_NK = log_probs_NK.clone(), ids_NK.clone()
        log_probs_NK[open_cut_N], ids_NK[open_cut_N] = order.values[:, :width], order.indices[:, :width]
    by_id_NK = ids_NK.argsort(dim=-1)
    ids_NK, log_probs_NK = ids_NK.gather(1, by_id_NK), log_probs_NK.gather(1, by_id_NK)
    order = log_probs_NK.sort(dim=-1, descending=True, stable=True)
    return order.values, ids_NK.gather(1, order.indices)


def prefix(probs_NK: Tensor, selection: PrefixSelection) -> Tensor:
    """Which of the ranked classes the policy keeps, bool [N, K]; see ``softlabel_schemas.selection.prefix_lengths``."""
    if isinstance(selection, TopK):
        kept_NK = torch.ones_like(probs_NK, dtype=torch.bool)
    elif isinstance(selection, Mass):
        kept_NK = (probs_NK.cumsum(dim=-1) - probs_NK) < selection.mass
    else:
        kept_NK = probs_NK >= selection.min_prob
    kept_NK[:, 0] = True
    return kept_NK


def to_soft_targets(selected: Selected, num_classes: int, temperatures: tuple[float, ...]) -> SoftTargets:
    """The selected entries of N frames, in the ragged form that is stored. ``selected`` is on the CPU."""
    kept_NK = selected.kept_NK.numpy()
    return SoftTargets(
        num_classes=num_classes,
        temperatures=temperatures,
        offsets=offsets_of(kept_NK.sum(axis=1)),
        class_ids=selected.ids_NK.numpy()[kept_NK].astype(np.int32),
        log_probs=selected.log_probs_NK.numpy()[kept_NK],
        tail_mass=selected.tail_NM.numpy(),
    )


def top1_targets(selected: Selected, num_classes: int, frames: slice) -> SoftTargets:
    """The posterior's likeliest class of each frame, at temperature 1."""
    log_probs_T = selected.top1_log_prob_N[frames].numpy()
    return SoftTargets(
        num_classes=num_classes,
        temperatures=(1.0,),
        offsets=np.arange(len(log_probs_T) + 1, dtype=np.int64),
        class_ids=selected.top1_N[frames].numpy().astype(np.int32),
        log_probs=log_probs_T,
        tail_mass=-np.expm1(log_probs_T)[:, None],
    )
