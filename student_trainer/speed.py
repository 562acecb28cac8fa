"""Speed perturbation (Ko et al., 2015): the waveform is resampled, labels and targets are re-timed to it.

At speed s, what was heard at time u is heard at u / s. Frame t of a front end is centred at (t + 1/2) times the frame shift,
so frame t of the changed speech is centred on what the recording has at s (t + 1/2) shifts: in its frame floor(s (t + 1/2)),
whose label and target it takes. That moves a border by half a frame at most. A target is never a mean of neighbours, which
would be none of the ensemble's posteriors.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import soxr

from softlabel_schemas.errors import InputError
from softlabel_schemas.front_end import Fbank
from softlabel_schemas.targets import SoftTargets, offsets_of
from student_trainer.batch import Example

Float32 = npt.NDArray[np.float32]


def at_speed(samples: Float32, speed: float) -> Float32:
    """Samples float32 [N] played ``speed`` times as fast, [N / speed] to the nearest: tempo and pitch change together."""
    if speed == 1:
        return samples
    # Without delay: what stood at sample n stands at n / speed. The unit of the rates does not matter.
    resampled: Float32 = soxr.resample(samples, speed, 1.0)
    return resampled


def num_samples_at(num_samples: int, speed: float) -> int:
    """How many :func:`at_speed` makes of so many; halves are rounded up."""
    return int(num_samples / speed + 0.5)


def source_frames(num_frames: int, num_source_frames: int, speed: float) -> npt.NDArray[np.int64]:
    """The frame of the recording that each of ``num_frames`` frames at ``speed`` is centred in, int64 [num_frames].

    The last frames of either may not be whole: what falls behind the end is the recording's last frame.
    """
    frames_T = (speed * (np.arange(num_frames) + 0.5)).astype(np.int64)
    return np.asarray(np.minimum(frames_T, num_source_frames - 1), dtype=np.int64)


def take_frames(targets: SoftTargets, frames_T: npt.NDArray[np.int64]) -> SoftTargets:
    """The frames ``frames_T`` of ``targets``, which may repeat."""
    counts_T = targets.counts_T[frames_T]
    offsets = offsets_of(counts_T)
    entries_E = np.arange(offsets[-1]) + np.repeat(targets.offsets[frames_T] - offsets[:-1], counts_T)
    return SoftTargets(
        num_classes=targets.num_classes,
        temperatures=targets.temperatures,
        offsets=offsets,
        class_ids=targets.class_ids[entries_E],
        log_probs=targets.log_probs[entries_E],
        tail_mass=targets.tail_mass[frames_T],
    )


def features_at_speed(samples: Float32, front_end: Fbank, speed: float) -> Float32:
    """Features float32 [T, D] of samples float32 [N] played at ``speed``.

    Raises:
        InputError: nothing is left of them.
    """
    played = at_speed(samples, speed)
    if front_end.num_frames(len(played)) == 0:
        raise InputError(f"{len(samples)} samples at speed {speed:g} are less than {front_end.shortest}")
    return front_end.compute(played)


def retimed(example: Example, speed: float) -> Example:
    """Hard labels and targets brought to the features' time.

    Args:
        example: features at ``speed``, labels and targets of the recording; one of these is there.
    """
    labels_T, soft, weights_T = example.hard_labels, example.soft, example.frame_weights
    frames_T = source_frames(len(example.features), example.num_labels, speed)
    return replace(
        example,
        hard_labels=None if labels_T is None else labels_T[frames_T],
        soft=None if soft is None else take_frames(soft, frames_T),
        frame_weights=None if weights_T is None else weights_T[frames_T],
    )
