"""Hard labels on the frames of a front end, from alignments that others made.

Our frames are Kaldi's with ``snip_edges`` off: frame t is centred at (t + 1/2) frame shifts, and an utterance has one for each
shift, to the nearest. ``stack`` of them become one with the label of the middle one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from softlabel_schemas.front_end import Fbank

Int32 = npt.NDArray[np.int32]
LabelT = TypeVar("LabelT", bound=np.generic)


class NumFramesError(ValueError):
    """An alignment has another number of frames than the audio."""


@dataclass(frozen=True, slots=True)
class AlignedItem:
    """A class and when it was spoken, in seconds from the start of the utterance; no time is NaN."""

    name: str
    start: float
    end: float


def class_ids_of(values: object) -> Int32:
    """A row of integers as class ids, int32 [frames]. Raises ValueError for anything else."""
    ids = np.asarray(values)
    if ids.ndim != 1 or not (np.issubdtype(ids.dtype, np.integer) or ids.size == 0):
        raise ValueError(f"{ids.dtype} of shape {ids.shape}, expected a row of integers")
    if ids.size and not -1 <= int(ids.min()) <= int(ids.max()) < 1 << 31:
        raise ValueError(f"class ids from {ids.min()} to {ids.max()}")
    return ids.astype(np.int32)


def on_frames(labels: Int32, num_samples: int, front_end: Fbank) -> Int32:
    """Labels of the utterance's frames, int32 [T], from an alignment of as many frames, or of those that Kaldi has by default.

    With ``snip_edges``, Kaldi's default, frame t begins at t shifts and is as long as the window, and all windows lie within
    the utterance: of 25 ms and 10 ms these are two frames fewer, the centre of frame t 2.5 ms before that of our frame t + 1.
    The first and the last label then stand for the frames at the edges.

    Raises:
        NumFramesError: any other number.
    """
    num_frames = front_end.num_frames(num_samples)
    shift = int(front_end.sample_rate * 0.001 * front_end.frame_shift_ms)
    window = int(front_end.sample_rate * 0.001 * front_end.frame_length_ms)
    num_whole = max(0, 1 + (num_samples - window) // shift)
    if len(labels) == num_frames:
        return labels
    if len(labels) == num_whole > 0:
        return labels[nearest_frames(num_whole, num_frames, window / shift)]
    raise NumFramesError(f"{len(labels)} frames, expected {num_frames} ({num_whole} with snip_edges)")


def nearest_frames(num_theirs: int, num_ours: int, window: float) -> npt.NDArray[np.int64]:
    """Of each of our frames the frame of theirs with the nearest centre, int64 [num_ours].

    Args:
        window: length of their frames, which begin at 0, 1, 2, ... frame shifts, in frame shifts.
    """
    first = round((window - 1) / 2)
    return np.clip(np.arange(num_ours) - first, 0, num_theirs - 1)


def frames_of_items(
    items: Sequence[AlignedItem], id_of_name: Mapping[str, int], num_frames: int, frame_shift_ms: float
) -> Int32:
    """The class of the item at the centre of each frame, int32 [T]; -1 where there is none.

    Raises:
        KeyError: a name has no id.
    """
    labels_T = np.full(num_frames, -1, dtype=np.int32)
    frames_per_second = 1000 / frame_shift_ms
    for item in items:
        # Centres at start <= (t + 1/2) / frames_per_second < end.
        # Cut to the utterance as floats: far times are no integers, not even all of those that are finite.
        first, stop = (
            int(np.clip(np.ceil(time * frames_per_second - 0.5), 0, num_frames)) for time in (item.start, item.end)
        )
        labels_T[first:stop] = id_of_name[item.name]
    return labels_T


def middle_of_stack(labels_T: npt.NDArray[LabelT], stack: int) -> npt.NDArray[LabelT]:
    """Labels of the frames that a front end with ``stack`` makes, [ceil(T / stack)]."""
    num_frames = -(-len(labels_T) // stack)
    return labels_T[np.minimum(stack * np.arange(num_frames) + stack // 2, len(labels_T) - 1)]
