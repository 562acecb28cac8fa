"""Front ends: utterance -> features, the same for teachers and students.

Kaldi-compatible filterbanks by kaldi-native-fbank, without dither (labels must be reproducible) and without cutting off
the edges, then low-frame-rate stacking (Pundak and Sainath, "Lower Frame Rate Neural Network Acoustic Models", 2016):
``stack`` neighbouring frames become one.
"""

from __future__ import annotations

import hashlib
import io
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from softlabel_schemas.corpus import Corpus, Utterance
from softlabel_schemas.errors import InputError
from softlabel_schemas.object_store import ObjectStore
from softlabel_schemas.strict import StrictModel

Float32 = npt.NDArray[np.float32]
# Keeps a constant dimension (digital silence) from being divided by nothing.
_MIN_STANDARD_DEVIATION = 1e-3


class UtteranceError(InputError):
    """One utterance cannot be read; a job may skip it."""


class Fbank(StrictModel):
    """Log mel filterbank.

    Attributes:
        sample_rate: Hz; audio of another rate is refused, not resampled.
        high_freq: Hz; 0 or less counts from the Nyquist frequency, as in Kaldi.
        normalize: "utterance" subtracts each dimension's mean over the utterance and divides by its deviation.
        stack: frames joined into one, which multiplies the frame shift.
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

    @property
    def num_features(self) -> int:
        return self.num_mel_bins * self.stack

    @property
    def output_frame_shift_ms(self) -> float:
        return self.frame_shift_ms * self.stack

    def num_frames(self, num_samples: int) -> int:
        """Frames of an utterance: one per started shift (to the nearest), in groups of ``stack``."""
        shift = int(self.sample_rate * 0.001 * self.frame_shift_ms)
        return -(-((num_samples + shift // 2) // shift) // self.stack)

    def compute(self, samples: Float32) -> Float32:
        """Features float32 [T, D] of samples float32 [N] in the range of 16-bit integers."""
        from kaldi_native_fbank import FbankOptions, OnlineFbank

        options = FbankOptions()
        options.frame_opts.samp_freq = self.sample_rate
        options.frame_opts.frame_length_ms = self.frame_length_ms
        options.frame_opts.frame_shift_ms = self.frame_shift_ms
        options.frame_opts.dither = 0.0
        options.frame_opts.snip_edges = False
        options.mel_opts.num_bins = self.num_mel_bins
        options.mel_opts.low_freq = self.low_freq
        options.mel_opts.high_freq = self.high_freq
        bank = OnlineFbank(options)
        bank.accept_waveform(self.sample_rate, samples)
        bank.input_finished()
        features_TD = np.stack([bank.get_frame(t) for t in range(bank.num_frames_ready)])
        if self.normalize == "utterance":
            deviation_D = np.maximum(features_TD.std(axis=0), _MIN_STANDARD_DEVIATION)
            features_TD = (features_TD - features_TD.mean(axis=0)) / deviation_D
        short = -len(features_TD) % self.stack
        if short:
            features_TD = np.concatenate([features_TD, np.repeat(features_TD[-1:], short, axis=0)])
        return features_TD.reshape(-1, self.num_features).astype(np.float32)


class Precomputed(StrictModel):
    """Features stored by the corpus (its ``features`` column)."""

    kind: Literal["precomputed"] = "precomputed"
    num_features: Annotated[int, Field(gt=0)]
    frame_shift_ms: Annotated[float, Field(gt=0)]

    @property
    def output_frame_shift_ms(self) -> float:
        return self.frame_shift_ms


FrontEnd = Annotated[Fbank | Precomputed, Field(discriminator="kind")]


class UtteranceReader:
    """Reads the audio or features of a corpus's utterances; keeps one utterance's file for several front ends."""

    def __init__(self, corpus: Corpus) -> None:
        self._corpus = corpus
        self._stores: dict[str, ObjectStore] = {}

    def features(self, utterance: Utterance, front_ends: list[Fbank | Precomputed]) -> list[Float32]:
        """Features float32 [T, D] for each front end; the file is read once.

        Raises:
            UtteranceError: the file is missing, unreadable, or not what its row says; both values are given.
        """
        data: dict[str, bytes] = {}
        samples: Float32 | None = None
        features = []
        for front_end in front_ends:
            location = utterance.audio if isinstance(front_end, Fbank) else utterance.features
            if location is None:
                raise UtteranceError(
                    f"utterance {utterance.utterance_id}: the front end '{front_end.kind}' needs "
                    f"{'audio' if isinstance(front_end, Fbank) else 'features'}, the corpus gives none"
                )
            if location not in data:
                data[location] = self._read(utterance, location)
            if isinstance(front_end, Precomputed):
                features.append(_decode_features(utterance, data[location], front_end))
                continue
            if utterance.sample_rate != front_end.sample_rate:
                raise UtteranceError(
                    f"utterance {utterance.utterance_id}: sample rate is {utterance.sample_rate} Hz, "
                    f"the front end expects {front_end.sample_rate} Hz"
                )
            if samples is None:
                samples = _decode_audio(utterance, data[location])
            if front_end.num_frames(len(samples)) == 0:
                raise UtteranceError(
                    f"utterance {utterance.utterance_id}: {len(samples)} samples are less than half a frame shift"
                )
            features.append(front_end.compute(samples))
        return features

    def _read(self, utterance: Utterance, location: str) -> bytes:
        folder, name = self._corpus.resolve(location)
        if folder not in self._stores:
            self._stores[folder] = ObjectStore(folder)
        try:
            data = self._stores[folder].read(name)
        except FileNotFoundError:
            # The reason of a skipped utterance is stored: it names the location as the corpus does, not this machine's.
            raise UtteranceError(f"utterance {utterance.utterance_id}: {location} does not exist") from None
        expected, found = utterance.sha256, hashlib.sha256(data).hexdigest()
        if expected is not None and found != expected and location == (utterance.audio or utterance.features):
            raise UtteranceError(
                f"utterance {utterance.utterance_id}: {location} has sha256 {found[:16]}..., the corpus manifest says "
                f"{expected[:16]}...; the file changed since the manifest was written"
            )
        return data


def _decode_audio(utterance: Utterance, data: bytes) -> Float32:
    import soundfile

    try:
        samples, sample_rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise UtteranceError(
            f"utterance {utterance.utterance_id}: {utterance.audio} is not readable audio: {error}"
        ) from None
    found = (sample_rate, len(samples), samples.shape[1])
    expected = (utterance.sample_rate, utterance.num_samples, 1)
    if found != expected:
        raise UtteranceError(
            f"utterance {utterance.utterance_id}: {utterance.audio} has (sample rate, samples, channels) {found}, "
            f"the corpus manifest says {expected}"
        )
    return np.ascontiguousarray(samples[:, 0]) * np.float32(32768)


def _decode_features(utterance: Utterance, data: bytes, front_end: Precomputed) -> Float32:
    try:
        # np.load would also take zip archives.
        features_TD = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except ValueError as error:
        raise UtteranceError(
            f"utterance {utterance.utterance_id}: {utterance.features} is not a .npy array: {error}"
        ) from None
    if features_TD.dtype != np.float32:
        raise UtteranceError(f"utterance {utterance.utterance_id}: features are {features_TD.dtype}, expected float32")
    if features_TD.ndim != 2 or features_TD.shape[1] != front_end.num_features or not len(features_TD):
        raise UtteranceError(
            f"utterance {utterance.utterance_id}: features have shape {features_TD.shape}, "
            f"expected [frames, {front_end.num_features}]"
        )
    return np.ascontiguousarray(features_TD, dtype=np.float32)
