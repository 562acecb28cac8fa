"""Augmentation of training speech whose targets are stored.

The targets were made once, of the speech as it was recorded; the student may hear it changed. That is right for changes
which leave true what the target says of each frame, and wrong for all others:

* Masks (SpecAugment; Park et al., 2019): valid. Nothing moves in time; the student learns to say of the masked speech what the
  ensemble said of the whole, from the context. Hard labels of masked frames stay, for the same reason.
* Speed (Ko et al., "Audio Augmentation for Speech Recognition", 2015): valid close to 1, with labels and targets re-timed
  (``speed.py``). The words stay, while pitch, formants and tempo change together; what the ensemble would have said of that
  is not quite what it said of the original, and the further from 1 the less so.
* Added noise, gain, filters and reverberation would be valid as masks are, if labels follow the delay of a filter. Not offered:
  they need recordings or rooms to draw from.
* Not valid: time warping without re-timing, mixing utterances (the ensemble never heard the mixture, and a mean of
  targets is not its posterior), shifts of pitch that change the speaker's voice beyond recognition.

Everything random is a function of (seed, epoch, row of the corpus): a resumed run draws what it would have drawn, and so does a
run with other labels. Only training speech is augmented, never a dev set.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from softlabel_schemas.front_end import Fbank
from student_trainer.config import Augmentation

Float32 = npt.NDArray[np.float32]
# No mask hides more than this share of an utterance (p of Park et al.): short ones would lose all that they say.
_MAX_MASKED_SHARE = 0.2
# What is drawn, each from a sequence of its own; the order of the batches has the one without such a key.
_SPEEDS, _MASKS = 0, 1


class Augmenter:
    """Draws speeds and masks."""

    def __init__(self, config: Augmentation, front_end: Fbank, seed: int) -> None:
        self.speeds = config.speeds
        self._config, self._front_end, self._seed = config, front_end, seed

    def speeds_N(self, num_utterances: int, epoch: int) -> npt.NDArray[np.float64]:
        """The speed of each utterance in an epoch, float64 [N]; uniform over those of the configuration."""
        rng = self._generator(epoch, _SPEEDS)
        return np.array(self.speeds, dtype=np.float64)[rng.integers(len(self.speeds), size=num_utterances)]

    def masked(self, features_TD: Float32, row: int, epoch: int) -> Float32:
        """A copy with masks, of the utterance in ``row`` of the corpus.

        A masked value is the utterance's mean of its mel bin, which is what normalised features have for "nothing". With
        ``stack``, a feature vector holds each bin ``stack`` times; masks are over the frames and bins before stacking, so a bin
        is masked in all of them.

        Args:
            features_TD: as the front end gives them, float32 [T, D].
        """
        rng = self._generator(epoch, _MASKS, row)
        # Frames before stacking, [T x stack, mel bins]: a view of the copy.
        masked = features_TD.copy()
        frames = masked.reshape(-1, self._front_end.num_mel_bins)
        mean = frames.mean(axis=0, dtype=np.float64).astype(np.float32)
        max_frames = self._config.max_time_mask_ms / self._front_end.frame_shift_ms
        max_frames = int(min(max_frames, _MAX_MASKED_SHARE * len(frames)))
        for _ in range(self._config.time_masks):
            frames[_mask(rng, len(frames), max_frames)] = mean
        for _ in range(self._config.frequency_masks):
            bins = _mask(rng, frames.shape[1], self._config.max_frequency_mask)
            frames[:, bins] = mean[bins]
        return masked

    def _generator(self, epoch: int, *key: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence([self._seed, epoch], spawn_key=key))


def _mask(rng: np.random.Generator, size: int, max_width: int) -> slice:
    """Width uniform over 0 .. ``max_width``, then the place uniform over those where it fits."""
    width = int(rng.integers(max_width, endpoint=True))
    start = int(rng.integers(size - width, endpoint=True))
    return slice(start, start + width)
