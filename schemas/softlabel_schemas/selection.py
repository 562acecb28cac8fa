"""Selection: which classes of a frame's posterior are kept.

Classes are ranked by falling probability, ties by rising class id; every policy keeps a prefix of that ranking, at
least its first class. With ``keep_hard_label`` the hard label's class follows as a further entry where the prefix left
it out, so that its probability is known exactly.

Sources: top-k and cumulative mass after Yang et al., "Essence Knowledge Distillation for Speech Recognition" (2019).
Every policy is biased: a student trained on the kept entries *renormalised* is too sharp, by what the tail held. The tail
mass is stored so that a student can do better (see FORMAT.md, "Reading").
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from softlabel_schemas.errors import InputError
from softlabel_schemas.strict import StrictModel
from softlabel_schemas.targets import SoftTargets

# Counts are stored in at most 16 bits; one entry more is left for the hard label.
Entries = Annotated[int, Field(ge=1, le=65_534)]
Probability = Annotated[float, Field(gt=0, le=1)]
# In the arrays of hard labels: this frame has none.
NO_LABEL = -1


class TopK(StrictModel):
    """The ``k`` likeliest classes."""

    policy: Literal["top_k"] = "top_k"
    k: Entries
    keep_hard_label: bool = False

    @property
    def cap(self) -> int:
        return self.k


class Mass(StrictModel):
    """The fewest classes whose probability reaches ``mass``, at most ``max_entries``."""

    policy: Literal["mass"] = "mass"
    mass: Probability
    max_entries: Entries
    keep_hard_label: bool = False

    @property
    def cap(self) -> int:
        return self.max_entries


class Threshold(StrictModel):
    """The classes of probability ``min_prob`` or more, at most ``max_entries``."""

    policy: Literal["threshold"] = "threshold"
    min_prob: Probability
    max_entries: Entries
    keep_hard_label: bool = False

    @property
    def cap(self) -> int:
        return self.max_entries


Selection = Annotated[TopK | Mass | Threshold, Field(discriminator="policy")]


def max_entries_per_frame(selection: TopK | Mass | Threshold, num_classes: int) -> int:
    return min(selection.cap + int(selection.keep_hard_label), num_classes)


def prefix_lengths(selection: TopK | Mass | Threshold, probs_TM: npt.NDArray[np.floating]) -> npt.NDArray[np.int64]:
    """How many of each frame's ranked classes the policy keeps, int64 [T].

    Args:
        probs_TM: ranked probabilities [T, M]; 0 where a frame has fewer than M.
    """
    if isinstance(selection, TopK):
        wanted = np.full(len(probs_TM), selection.k)
    elif isinstance(selection, Mass):
        # Keep an entry while the entries before it have not reached the mass.
        before_TM = np.cumsum(probs_TM, axis=1) - probs_TM
        wanted = (before_TM < selection.mass).sum(axis=1)
    else:
        wanted = (probs_TM >= selection.min_prob).sum(axis=1)
    available = (probs_TM > 0).sum(axis=1)
    return np.asarray(np.minimum(np.clip(wanted, 1, selection.cap), available), dtype=np.int64)


def check_derivable(stored: TopK | Mass | Threshold, wanted: TopK | Mass | Threshold) -> None:
    """Raises InputError where ``wanted`` cannot be derived from targets captured with ``stored``."""
    reason = None
    if wanted.keep_hard_label and not stored.keep_hard_label:
        reason = "the hard label was not always kept"
    elif wanted.cap > stored.cap:
        reason = f"at most {stored.cap} entries per frame were kept, {wanted.cap} are asked for"
    elif isinstance(stored, TopK) or wanted.cap == 1:
        reason = None
    elif stored.keep_hard_label and not wanted.keep_hard_label:
        reason = "a hard label kept beside the selection cannot be told from its last entry; keep hard labels"
    elif wanted.policy != stored.policy:
        reason = f"a '{wanted.policy}' selection needs entries that a '{stored.policy}' selection may have dropped"
    elif isinstance(stored, Mass) and isinstance(wanted, Mass) and wanted.mass > stored.mass:
        reason = f"mass {stored.mass:g} was kept, {wanted.mass:g} is asked for"
    elif isinstance(stored, Threshold) and isinstance(wanted, Threshold) and wanted.min_prob < stored.min_prob:
        reason = f"classes below {stored.min_prob:g} were dropped, min_prob {wanted.min_prob:g} is asked for"
    if reason:
        raise InputError(
            f"this selection cannot be derived from the stored one: {reason}; label again with a wider one"
        )


def narrow(
    targets: SoftTargets, wanted: TopK | Mass | Threshold, hard_labels_T: npt.NDArray[np.integer] | None = None
) -> SoftTargets:
    """Select again from stored targets; what is dropped moves to the tail. Check with :func:`check_derivable` first.

    Args:
        hard_labels_T: class id of each frame or ``NO_LABEL``, [T]; needed where ``wanted`` keeps the hard label.

    Raises:
        ValueError: hard labels are missing, or not one for each frame.
    """
    ids_TM, log_probs_TM = targets.padded()
    lengths_T = prefix_lengths(wanted, np.exp(log_probs_TM.astype(np.float64)))
    kept_TM = np.arange(ids_TM.shape[1]) < lengths_T[:, None]
    if wanted.keep_hard_label:
        if hard_labels_T is None or len(hard_labels_T) != targets.num_frames:
            found = "none" if hard_labels_T is None else len(hard_labels_T)
            raise ValueError(f"keep_hard_label needs {targets.num_frames} hard labels, one per frame, found {found}")
        kept_TM |= ids_TM == hard_labels_T[:, None]
    return targets.keep(kept_TM[np.isfinite(log_probs_TM)])
