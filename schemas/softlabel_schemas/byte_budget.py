"""Byte budget: how many entries each frame of an utterance gets, for a given average of stored bytes per frame.

Whichever entries are kept, the bytes are taken to be a function of how many they are, so that all cost the same. What keeps the
most mass is then the likeliest entries of the whole utterance: exchanging one of them for any other keeps less. At
least one entry of each frame is kept, however small the budget is.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from softlabel_schemas.selection import ByteBudget
from softlabel_schemas.spec import CodecName
from softlabel_schemas.targets import SoftTargets


class Cost(NamedTuple):
    """Bytes per frame of what grows with the corpus (shards, commit records, utterance index), for n entries per frame on
    average: frame + entry n + root sqrt(n)."""

    frame: float
    entry: float
    root: float

    def entries(self, bytes_per_frame: float) -> float:
        """Per frame, that cost so much; 0 where the frame alone does."""
        room = max(0.0, bytes_per_frame - self.frame)
        return (2 * room / (self.root + math.sqrt(self.root**2 + 4 * self.entry * room))) ** 2 if room else 0.0


# Least squares of the relative error over 1 to 26 entries per frame, on posteriors of 660 senones by three models (125
# utterances of 136 frames on average, none of them in the test's file), in Parquet, with tails at one temperature: those of
# further ones come on top. With "mtf-sqrt" the first ranks cost more than the later ones, whose steps are small and alike.
COSTS: dict[CodecName, Cost] = {
    "mtf-sqrt": Cost(frame=0.0, entry=0.81, root=1.80),
    "packed-u8": Cost(frame=2.21, entry=1.86, root=0.0),
    "packed-f32": Cost(frame=3.97, entry=4.68, root=0.0),
}


def keep_within_budget(targets: SoftTargets, selection: ByteBudget, codec: CodecName) -> SoftTargets:
    """The entries of one utterance that the budget keeps; what is dropped moves to the tail.

    Of equally likely entries those of earlier frames are kept. Frames without entries count as frames.

    Args:
        targets: ranked, at least the ``max_entries`` likeliest classes of each frame, or what a larger budget kept.
    """
    affordable = int(COSTS[codec].entries(selection.bytes_per_frame) * targets.num_frames)
    ranks_E = np.arange(targets.num_entries) - np.repeat(targets.offsets[:-1], targets.counts_T)
    kept_E = ranks_E == 0
    candidates = np.flatnonzero((ranks_E > 0) & (ranks_E < selection.max_entries))
    # Stable: within a frame equally likely entries stay in the order of their ranks, so a prefix is kept.
    order = np.argsort(-targets.log_probs[candidates], kind="stable")
    kept_E[candidates[order[: max(0, affordable - int(kept_E.sum()))]]] = True
    return targets.keep(kept_E)
