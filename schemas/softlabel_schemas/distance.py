"""How far two soft targets of the same frames are from each other.

Of a class that one of them did not keep only the mass of the tail is known. So both are compared over the classes that both
kept, and all others as one class more: this is exact for what is stored, needs no guess at how a tail is spread, and is a lower
bound of the divergence of the whole posteriors (data processing inequality; Cover and Thomas, "Elements of Information
Theory", section 2.8). Targets that differ only in how much was kept of one posterior have the divergence 0.

Shape suffixes: T frames, E entries of all frames together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from softlabel_schemas.selection import MIN_LOG_PROB
from softlabel_schemas.targets import SoftTargets, segment_sum

Float64 = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Distance:
    """Of each frame, [T].

    Attributes:
        kl_ab_T, kl_ba_T: KL(a || b) and KL(b || a) at temperature 1, nats, at least; 0 where one of them stores no entry.
        is_known_T: both store entries, so that there is something to compare.
        same_top1_T: the likeliest class is the same.
        num_shared_T: classes that both kept.
    """

    kl_ab_T: Float64
    kl_ba_T: Float64
    is_known_T: Bool
    same_top1_T: Bool
    num_shared_T: npt.NDArray[np.int64]


def distance(a: SoftTargets, b: SoftTargets) -> Distance:
    """Raises ValueError unless both have the same number of frames and classes."""
    if (a.num_frames, a.num_classes) != (b.num_frames, b.num_classes):
        raise ValueError(
            f"{a.num_frames} frames of {a.num_classes} classes and {b.num_frames} of {b.num_classes} cannot be compared"
        )
    keys_a, keys_b = _keys_E(a), _keys_E(b)
    shared, in_a, in_b = np.intersect1d(keys_a, keys_b, assume_unique=True, return_indices=True)
    frames = shared // a.num_classes
    log_a, log_b = (_normalised(each)[index] for each, index in ((a, in_a), (b, in_b)))
    rest_a_T, rest_b_T = _log_rest_T(a, in_a), _log_rest_T(b, in_b)

    def kl_T(log_p: Float64, log_q: Float64, rest_p_T: Float64, rest_q_T: Float64) -> Float64:
        kept_T = np.bincount(frames, np.exp(log_p) * (log_p - log_q), minlength=a.num_frames)
        # Rounding can leave it a little below 0.
        return np.maximum(kept_T + np.exp(rest_p_T) * (rest_p_T - rest_q_T), 0.0)

    is_known_T = (a.counts_T > 0) & (b.counts_T > 0)
    return Distance(
        kl_ab_T=np.where(is_known_T, kl_T(log_a, log_b, rest_a_T, rest_b_T), 0.0),
        kl_ba_T=np.where(is_known_T, kl_T(log_b, log_a, rest_b_T, rest_a_T), 0.0),
        is_known_T=is_known_T,
        same_top1_T=is_known_T & (a.top1_T() == b.top1_T()),
        num_shared_T=np.bincount(frames, minlength=a.num_frames).astype(np.int64),
    )


def same_targets(a: SoftTargets, b: SoftTargets) -> bool:
    """Whether they are equal to the bit."""
    arrays = ("offsets", "class_ids", "log_probs", "tail_mass")
    return a.temperatures == b.temperatures and all(np.array_equal(getattr(a, x), getattr(b, x)) for x in arrays)


def _keys_E(targets: SoftTargets) -> npt.NDArray[np.int64]:
    """Frame and class as one number."""
    frames_E = np.repeat(np.arange(targets.num_frames, dtype=np.int64), targets.counts_T)
    return frames_E * targets.num_classes + targets.class_ids


def _log_total_T(targets: SoftTargets) -> Float64:
    """Of kept and tail mass, which are 1 only within the codec's error."""
    return np.log(targets.kept_mass_T() + targets.tail_mass[:, 0])


def _normalised(targets: SoftTargets) -> Float64:
    return targets.log_probs.astype(np.float64) - np.repeat(_log_total_T(targets), targets.counts_T)


def _log_rest_T(targets: SoftTargets, shared: npt.NDArray[np.integer]) -> Float64:
    """ln of the mass outside the entries ``shared``: added up, not taken from 1, which would cancel."""
    is_other_E = np.ones(targets.num_entries, dtype=bool)
    is_other_E[shared] = False
    others_E = np.where(is_other_E, np.exp(targets.log_probs.astype(np.float64)), 0.0)
    with np.errstate(divide="ignore"):
        rest_T = np.log(segment_sum(others_E, targets.offsets) + targets.tail_mass[:, 0]) - _log_total_T(targets)
    return np.asarray(np.maximum(rest_T, MIN_LOG_PROB))
