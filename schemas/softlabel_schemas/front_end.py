"""Front ends: samples -> features, the same for teachers and students.

Kaldi-compatible filterbanks by kaldi-native-fbank, without dither (labels must be reproducible) and without cutting off
the edges unless asked to, then low-frame-rate stacking (Pundak and Sainath, "Lower Frame Rate Neural Network Acoustic
Models", 2016): ``stack`` neighbouring frames become one. Models that take waveforms get samples.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from softlabel_schemas.errors import InputError
from softlabel_schemas.strict import StrictModel

Float32 = npt.NDArray[np.float32]
# Of 16-bit samples; models of waveforms take them within 1.
FULL_SCALE = np.float32(32768)
# Added to the variance of a waveform, as in the feature extractor of wav2vec 2.0.
_WAVEFORM_EPSILON = 1e-7
# Keeps a constant dimension (digital silence) from being divided by nothing.
_MIN_STANDARD_DEVIATION = 1e-3
# kaldi-native-fbank copies samples one by one and holds Python's lock meanwhile: long enough, for all of an utterance's, that
# models in another thread wait for it. Pieces give the same features; a list is copied faster than an array.
_CHUNK_SAMPLES = 4000


class Fbank(StrictModel):
    """Log mel filterbank.

    Attributes:
        sample_rate: Hz; audio of another rate is refused, not resampled.
        high_freq: Hz; 0 or less counts from the Nyquist frequency, as in Kaldi.
        normalize: "utterance" subtracts each dimension's mean over the utterance and divides by its deviation.
        stack: frames joined into one, which multiplies the frame shift.
        snip_edges: only frames that lie within the utterance, as Kaldi's default is. With windows of 25 ms every 10 ms, two
            stacked, there are as many as wav2vec 2.0 and HuBERT give.
    """

    kind: Literal["fbank"] = "fbank"
    sample_rate: Annotated[int, Field(gt=0)] = 16_000
    num_mel_bins: Annotated[int, Field(ge=4, le=256)] = 40
    frame_length_ms: Annotated[float, Field(gt=0)] = 25.0
    frame_shift_ms: Annotated[float, Field(gt=0)] = 10.0
    low_freq: float = 20.0
    high_freq: float = 0.0
    normalize: Literal["none", "utterance"] = "utterance"
    stack: Annotated[int, Field(ge=1, le=16)] = 1
    # Left out of stored documents where false, so that bundles made before it keep their digests.
    snip_edges: bool = Field(default=False, exclude_if=lambda snip_edges: not snip_edges)

    @model_validator(mode="after")
    def _check(self) -> Self:
        # kaldi-native-fbank divides by it, which ends the process.
        if self._shift < 1:
            raise ValueError(
                f"frame_shift_ms is {self.frame_shift_ms:g}, less than a sample at {self.sample_rate} Hz; expected one or more "
                f"({1000 / self.sample_rate:g} ms)"
            )
        return self

    @property
    def num_features(self) -> int:
        return self.num_mel_bins * self.stack

    @property
    def output_frame_shift_ms(self) -> float:
        return self.frame_shift_ms * self.stack

    def num_frames(self, num_samples: int) -> int:
        """Frames of an utterance: one per started shift (to the nearest), or with ``snip_edges`` one per whole window, in
        groups of ``stack``."""
        shift = self._shift
        num_frames = (num_samples + shift // 2) // shift
        if self.snip_edges:
            num_frames = max(0, (num_samples - int(self.sample_rate * 0.001 * self.frame_length_ms)) // shift + 1)
        return -(-num_frames // self.stack)

    @property
    def _shift(self) -> int:
        """Samples."""
        return int(self.sample_rate * 0.001 * self.frame_shift_ms)

    @property
    def shortest(self) -> str:
        """What gives a frame."""
        return "a window" if self.snip_edges else "half a frame shift"

    def check(self) -> None:
        """Before any audio is read. Raises InputError where there is no such filterbank."""
        self._bank()

    def _bank(self) -> Any:
        from kaldi_native_fbank import FbankOptions, OnlineFbank

        options = FbankOptions()
        options.frame_opts.samp_freq = self.sample_rate
        options.frame_opts.frame_length_ms = self.frame_length_ms
        options.frame_opts.frame_shift_ms = self.frame_shift_ms
        options.frame_opts.dither = 0.0
        options.frame_opts.snip_edges = self.snip_edges
        options.mel_opts.num_bins = self.num_mel_bins
        options.mel_opts.low_freq = self.low_freq
        options.mel_opts.high_freq = self.high_freq
        try:
            return OnlineFbank(options)
        except ValueError as error:
            raise InputError(
                f"front_end: there is no filterbank of num_mel_bins {self.num_mel_bins}, low_freq {self.low_freq:g}, high_freq "
                f"{self.high_freq:g} and frame_length_ms {self.frame_length_ms:g} at {self.sample_rate} Hz ({error}); use "
                f"fewer bins, a longer frame, or frequencies from 0 to {self.sample_rate / 2:g} Hz"
            ) from None

    def compute(self, samples: Float32) -> Float32:
        """Features float32 [T, D] of samples float32 [N] in the range of 16-bit integers. Raises InputError, see ``check``."""
        bank = self._bank()
        for start in range(0, len(samples), _CHUNK_SAMPLES):
            bank.accept_waveform(self.sample_rate, samples[start : start + _CHUNK_SAMPLES].tolist())
        bank.input_finished()
        features_TD = np.stack([bank.get_frame(t) for t in range(bank.num_frames_ready)])
        if self.normalize == "utterance":
            deviation_D = np.maximum(features_TD.std(axis=0), _MIN_STANDARD_DEVIATION)
            features_TD = (features_TD - features_TD.mean(axis=0)) / deviation_D
        short = -len(features_TD) % self.stack
        if short:
            features_TD = np.concatenate([features_TD, np.repeat(features_TD[-1:], short, axis=0)])
        return features_TD.reshape(-1, self.num_features).astype(np.float32)


class Waveform(StrictModel):
    """Samples within 1, one feature each.

    Attributes:
        sample_rate: Hz; audio of another rate is refused, not resampled.
        normalize: "utterance" gives each utterance zero mean and unit variance.
    """

    kind: Literal["waveform"] = "waveform"
    sample_rate: Annotated[int, Field(gt=0)] = 16_000
    normalize: Literal["none", "utterance"] = "utterance"

    @property
    def num_features(self) -> int:
        return 1

    @property
    def output_frame_shift_ms(self) -> float:
        return 1000 / self.sample_rate

    def compute(self, samples: Float32) -> Float32:
        """Features float32 [N, 1] of samples float32 [N] in the range of 16-bit integers."""
        scaled_N = samples / FULL_SCALE
        if self.normalize == "utterance":
            scaled_N = (scaled_N - scaled_N.mean()) / np.sqrt(scaled_N.var() + _WAVEFORM_EPSILON)
        return scaled_N.astype(np.float32)[:, None]


class Precomputed(StrictModel):
    """Features stored by the corpus (its ``features`` column)."""

    kind: Literal["precomputed"] = "precomputed"
    num_features: Annotated[int, Field(gt=0)]
    frame_shift_ms: Annotated[float, Field(gt=0)]

    @property
    def output_frame_shift_ms(self) -> float:
        return self.frame_shift_ms


AnyFrontEnd = Fbank | Waveform | Precomputed
FrontEnd = Annotated[AnyFrontEnd, Field(discriminator="kind")]
