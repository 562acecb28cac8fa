"""How far two soft targets of the same frames are from each other.

Of a class that one of them did not keep only the mass of the tail is known. So both are compared over the classes that both
kept, and all others as one class more: this is exact for what is stored, needs no guess at how a tail is spread, and is a lower
bound of the divergence of the whole posteriors (data processing inequality; Cover and Thomas, "Elements of Information
Theory", section 2.8). Targets that differ only in how much was kept of one posterior have the divergence 0.

A lossy codec stores next to nothing as one small probability, and a small tail as 0 (:mod:`softlabel_schemas.floors`): their
logarithms say nothing. So all that is compared is first raised to the least that both codecs tell from 0, then normalised.
For "mtf-sqrt" that is 6.8e-6 of a class, and of the rest as much for each of its entries that are below: 0.0042 for 618 of
them. Both properties hold but for what the codecs round.

Shape suffixes: T frames, E entries of all frames together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from softlabel_schemas.floors import FLOORS, Floor
from softlabel_schemas.spec import CodecName
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


def distance(
    a: SoftTargets, b: SoftTargets, codec_a: CodecName = "packed-f32", codec_b: CodecName = "packed-f32"
) -> Distance:
    """
    Args:
        codec_a, codec_b: that ``a`` and ``b`` were decoded from; the default is for targets as captured, too.

    Raises:
        ValueError: they differ in their numbers of frames or classes.
    """
    if (a.num_frames, a.num_classes) != (b.num_frames, b.num_classes):
        raise ValueError(
            f"{a.num_frames} frames of {a.num_classes} classes and {b.num_frames} of {b.num_classes} cannot be compared"
        )
    shared, in_a, in_b = np.intersect1d(a.keys_E(), b.keys_E(), assume_unique=True, return_indices=True)
    frames = shared // a.num_classes
    floor_a, floor_b = FLOORS[codec_a], FLOORS[codec_b]
    log_below = float(np.log(max(floor_a.below, floor_b.below)))
    (rest_a_T, unclear_a_T), (rest_b_T, unclear_b_T) = _rest_T(a, in_a, floor_a), _rest_T(b, in_b, floor_b)
    unclear_T = np.maximum(unclear_a_T, unclear_b_T)

    def normalised(log_probs: npt.NDArray[np.float32], rest_T: Float64) -> tuple[Float64, Float64]:
        log_p, rest_T = np.maximum(log_probs.astype(np.float64), log_below), np.maximum(rest_T, unclear_T)
        log_total_T = np.log(np.bincount(frames, np.exp(log_p), minlength=a.num_frames) + rest_T)
        return log_p - log_total_T[frames], np.log(rest_T) - log_total_T

    log_a, log_rest_a_T = normalised(a.log_probs[in_a], rest_a_T)
    log_b, log_rest_b_T = normalised(b.log_probs[in_b], rest_b_T)

    def kl_T(log_p: Float64, log_q: Float64, rest_p_T: Float64, rest_q_T: Float64) -> Float64:
        kept_T = np.bincount(frames, np.exp(log_p) * (log_p - log_q), minlength=a.num_frames)
        # Rounding can leave it a little below 0.
        return np.maximum(kept_T + np.exp(rest_p_T) * (rest_p_T - rest_q_T), 0.0)

    is_known_T = (a.counts_T > 0) & (b.counts_T > 0)
    return Distance(
        kl_ab_T=np.where(is_known_T, kl_T(log_a, log_b, log_rest_a_T, log_rest_b_T), 0.0),
        kl_ba_T=np.where(is_known_T, kl_T(log_b, log_a, log_rest_b_T, log_rest_a_T), 0.0),
        is_known_T=is_known_T,
        same_top1_T=is_known_T & (a.top1_T() == b.top1_T()),
        num_shared_T=np.bincount(frames, minlength=a.num_frames).astype(np.int64),
    )


def same_targets(a: SoftTargets, b: SoftTargets) -> bool:
    """Whether they are equal to the bit."""
    arrays = ("offsets", "class_ids", "log_probs", "tail_mass")
    return a.temperatures == b.temperatures and all(np.array_equal(getattr(a, x), getattr(b, x)) for x in arrays)


def _rest_T(targets: SoftTargets, shared: npt.NDArray[np.integer], floor: Floor) -> tuple[Float64, Float64]:
    """The mass outside the entries ``shared``: added up, not taken from 1, which would cancel. And how much of it, at most, the
    codec does not tell from 0."""
    is_other_E = np.ones(targets.num_entries, dtype=bool)
    is_other_E[shared] = False
    is_unclear_E = is_other_E & (targets.log_probs < np.log(floor.below))
    probs_E = np.exp(targets.log_probs.astype(np.float64))
    rest_T = segment_sum(np.where(is_other_E, probs_E, 0.0), targets.offsets) + targets.tail_mass[:, 0]
    return rest_T, segment_sum(is_unclear_E * floor.below, targets.offsets) + floor.tail
