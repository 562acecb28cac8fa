"""Narrowing: a selection made of what another one stored, as capture would have made it from the whole posterior.

What can be derived is exact but for the codec: with a lossy one the policies see decoded values, and the tails are added up
in another order, the codec's floor for each entry that is next to nothing (``tempering.py`` says how much that makes). What
cannot be derived raises; it is never approximated.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from softlabel_schemas.byte_budget import keep_within_budget
from softlabel_schemas.errors import InputError
from softlabel_schemas.frame_selection import FrameSelection, frame_weights
from softlabel_schemas.sampling import sampled
from softlabel_schemas.selection import (
    AnySelection,
    ByteBudget,
    Mass,
    PrefixSelection,
    SampledSelection,
    Threshold,
    TopK,
    prefix_lengths,
)
from softlabel_schemas.spec import DatasetSpec
from softlabel_schemas.targets import SoftTargets


def check_derivable(stored: AnySelection, wanted: AnySelection, *, num_classes: int, temperature: float = 1.0) -> None:
    """Raises InputError where ``wanted`` cannot be derived, at ``temperature``, from targets captured with ``stored``."""
    reason = None
    if isinstance(wanted, SampledSelection) and temperature != 1:
        reason = f"a sample is of temperature 1, {temperature:g} is asked for"
    elif wanted != stored:
        reason = _obstacle(stored, wanted, num_classes)
    if reason:
        raise InputError(
            f"this selection cannot be derived from the stored one: {reason}; label again with a wider one"
        )


def _obstacle(stored: AnySelection, wanted: AnySelection, num_classes: int) -> str | None:
    """Why ``wanted``, which is not ``stored``, cannot be derived; None: it can. The rules of FORMAT.md, in their order."""
    if isinstance(stored, SampledSelection):
        return "a sample was stored, from which no other selection can be made"
    if stored.frames is not None and not _drops_as_well(wanted.frames, stored.frames):
        return "frames were dropped that it keeps"
    if isinstance(wanted, SampledSelection):
        if isinstance(stored, TopK) and stored.k >= num_classes:
            return None
        return f"a sample is drawn from all {num_classes} classes, which only a 'top_k' selection of so many keeps"
    if wanted.keep_hard_label and not stored.keep_hard_label:
        return "the hard label was not always kept"
    if wanted.cap > stored.cap:
        return f"at most {stored.cap} entries per frame were kept, {wanted.cap} are asked for"
    if isinstance(stored, TopK) or wanted.cap == 1:
        return None
    if stored.keep_hard_label and not wanted.keep_hard_label:
        return "a hard label kept beside the selection cannot be told from its last entry; keep hard labels"
    if wanted.policy != stored.policy:
        return f"a '{wanted.policy}' selection needs entries that a '{stored.policy}' selection may have dropped"
    if isinstance(stored, Mass) and isinstance(wanted, Mass) and wanted.mass > stored.mass:
        return f"mass {stored.mass:g} was kept, {wanted.mass:g} is asked for"
    if isinstance(stored, Threshold) and isinstance(wanted, Threshold) and wanted.min_prob < stored.min_prob:
        return f"classes below {stored.min_prob:g} were dropped, min_prob {wanted.min_prob:g} is asked for"
    if isinstance(stored, ByteBudget) and isinstance(wanted, ByteBudget):
        return _budget_obstacle(stored, wanted)
    return None


def _budget_obstacle(stored: ByteBudget, wanted: ByteBudget) -> str | None:
    if wanted.bytes_per_frame > stored.bytes_per_frame:
        return f"{stored.bytes_per_frame:g} bytes per frame were kept, {wanted.bytes_per_frame:g} are asked for"
    if wanted.max_entries != stored.max_entries or wanted.frames != stored.frames:
        return (
            "of two budgets 'max_entries' and 'frames' must be equal: what one frame may not spend, another one spends on "
            "entries that may have been dropped"
        )
    return None


def _drops_as_well(wanted: FrameSelection | None, stored: FrameSelection) -> bool:
    """Whether every frame that ``stored`` drops is one that ``wanted`` drops."""
    return wanted is not None and (
        wanted.disagreeing <= stored.disagreeing
        and wanted.silence <= stored.silence
        and (stored.uncertain == 1 or (wanted.uncertain == 0 and wanted.min_top1 >= stored.min_top1))
    )


def narrow(
    targets: SoftTargets,
    spec: DatasetSpec,
    wanted: AnySelection,
    *,
    utterance_id: str,
    hard_labels_T: npt.NDArray[np.integer] | None = None,
    silence_V: npt.NDArray[np.bool_] | None = None,
) -> SoftTargets:
    """Select again from the stored targets of one utterance; what is dropped moves to the tail.

    Check with :func:`check_derivable` first.

    Args:
        targets: whole utterance, of a dataset of ``spec``.
        hard_labels_T: class id of each frame or ``NO_LABEL``, [T]; needed where ``wanted`` keeps the hard label or drops
            frames.
        silence_V: see ``frame_selection.silence_classes``; needed where ``wanted`` drops frames.

    Raises:
        ValueError: hard labels are missing, or not one for each frame.
    """
    if wanted == spec.selection:
        return targets
    labels_T = np.empty(0, np.int32) if hard_labels_T is None else hard_labels_T
    if (wanted.keep_hard_label or wanted.frames is not None) and len(labels_T) != targets.num_frames:
        found = "none" if hard_labels_T is None else len(hard_labels_T)
        raise ValueError(f"this selection needs {targets.num_frames} hard labels, one per frame, found {found}")
    if wanted.frames is not None:
        if silence_V is None:
            raise ValueError("a selection of frames needs to know the classes of silence")
        targets = drop_frames(targets, frame_weights(targets, labels_T, silence_V, wanted.frames) == 0)
    if isinstance(wanted, SampledSelection):
        return sampled(targets, wanted, utterance_id)
    if isinstance(wanted, ByteBudget):
        return keep_within_budget(targets, wanted, spec.codec)
    return _prefix(targets, wanted, labels_T)


def drop_frames(targets: SoftTargets, dropped_T: npt.NDArray[np.bool_]) -> SoftTargets:
    """Frames where ``dropped_T`` [T] is true lose their entries: all their mass is tail."""
    kept = targets.keep(np.repeat(~dropped_T, targets.counts_T))
    kept.tail_mass[dropped_T] = 1.0
    return kept


def _prefix(targets: SoftTargets, wanted: PrefixSelection, labels_T: npt.NDArray[np.integer]) -> SoftTargets:
    ids_TM, log_probs_TM = targets.padded()
    lengths_T = prefix_lengths(wanted, np.exp(log_probs_TM.astype(np.float64)))
    kept_TM = np.arange(ids_TM.shape[1]) < lengths_T[:, None]
    if wanted.keep_hard_label:
        kept_TM |= ids_TM == labels_T[:, None]
    return targets.keep(kept_TM[np.isfinite(log_probs_TM)])
