"""Codecs: soft targets <-> byte streams, encode beside decode, with a stated error bound.

A codec turns the targets of one utterance into a few named byte streams; a shard stores each stream as a column. Streams
of consecutive utterances can be joined and decoded at once, which is what makes reading fast.

``packed-u8`` is the default: on real senone posteriors it costs 2 bytes an entry after zstd and a mean KL of 8.6e-5
nats. ``packed-f32`` loses nothing and costs twice as much. All numbers are little-endian.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from softlabel_schemas.selection import max_entries_per_frame
from softlabel_schemas.spec import DatasetSpec
from softlabel_schemas.targets import RAW_MASS_TOLERANCE, Float32, SoftTargets, offsets_of

STREAMS = ("counts", "class_ids", "log_probs", "tail_mass")

# 1/16 nat: a power of two, so that decoding is exact in float32 in every language.
LOG_PROB_STEP = np.float32(1 / 16)
_TAIL_LEVELS = 65_535
_TAIL_TABLE = ((np.arange(_TAIL_LEVELS + 1, dtype=np.float64) / _TAIL_LEVELS) ** 2).astype(np.float32)


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedCodec:
    """Four planar streams: entries per frame, class ids, log-probabilities, tail masses.

    Attributes:
        lossy: "packed-u8" when true, "packed-f32" otherwise.
        count_dtype: u1 where the selection allows at most 255 entries a frame, else u2.
        id_dtype: u2 for at most 65,536 classes, else u4.

    Error bound of "packed-u8": a log-probability of at least -15.9375 is off by at most 1/32 nat, smaller ones become
    -15.9375; the square root of a tail mass is off by at most 1/131070 (1/65535 for a tail above 0.99996), and
    by float32 rounding.
    """

    lossy: bool
    num_classes: int
    max_entries: int
    temperatures: tuple[float, ...]
    count_dtype: np.dtype[np.unsignedinteger]
    id_dtype: np.dtype[np.unsignedinteger]

    @property
    def mass_tolerance(self) -> float:
        """How far kept mass + tail mass of decoded targets may be from 1: exp(1/32) - 1, and what 65,535 clamped
        entries of exp(-15.9375) add."""
        return 0.042 if self.lossy else RAW_MASS_TOLERANCE

    @property
    def log_prob_dtype(self) -> np.dtype[np.generic]:
        return np.dtype("u1") if self.lossy else np.dtype("<f4")

    @property
    def tail_dtype(self) -> np.dtype[np.generic]:
        return np.dtype("<u2") if self.lossy else np.dtype("<f4")

    def encode(self, targets: SoftTargets) -> dict[str, bytes]:
        """The streams of validated targets. Raises ValueError where a count or id does not fit (never wraps)."""
        counts_T = targets.counts_T
        if counts_T.max(initial=0) > self.max_entries:
            raise ValueError(f"a frame has {counts_T.max()} entries, the selection allows {self.max_entries}")
        if targets.num_classes != self.num_classes or targets.temperatures != self.temperatures:
            raise ValueError(
                f"targets have {targets.num_classes} classes at temperatures {targets.temperatures}, the dataset "
                f"{self.num_classes} at {self.temperatures}"
            )
        log_probs: npt.NDArray[np.generic] = targets.log_probs
        tails: npt.NDArray[np.generic] = targets.tail_mass
        if self.lossy:
            log_probs = np.clip(np.rint(targets.log_probs / -LOG_PROB_STEP), 0, 255)
            # A frame with entries keeps a tail below 1, or its posterior at another temperature would be lost.
            highest_T1 = np.where(counts_T > 0, _TAIL_LEVELS - 1, _TAIL_LEVELS)[:, None]
            tails = np.minimum(np.rint(np.sqrt(targets.tail_mass.astype(np.float64)) * _TAIL_LEVELS), highest_T1)
        return {
            "counts": counts_T.astype(self.count_dtype).tobytes(),
            "class_ids": targets.class_ids.astype(self.id_dtype).tobytes(),
            "log_probs": log_probs.astype(self.log_prob_dtype).tobytes(),
            "tail_mass": tails.astype(self.tail_dtype).tobytes(),
        }

    def decode(self, streams: Mapping[str, bytes | memoryview], num_frames: int) -> SoftTargets:
        """Targets of ``num_frames`` consecutive frames; not validated.

        Raises:
            ValueError: a stream's length does not fit the frames or the entries.
        """
        counts_T = _view(streams, "counts", self.count_dtype, num_frames)
        if counts_T.max(initial=0) > self.max_entries:
            raise ValueError(f"a frame has {counts_T.max()} entries, the selection allows {self.max_entries}")
        offsets = offsets_of(counts_T)
        num_entries, num_temperatures = int(offsets[-1]), len(self.temperatures)
        class_ids_E = _view(streams, "class_ids", self.id_dtype, num_entries).astype(np.int32)
        log_probs_E = _view(streams, "log_probs", self.log_prob_dtype, num_entries)
        tails_TK = _view(streams, "tail_mass", self.tail_dtype, num_frames * num_temperatures)
        return SoftTargets(
            num_classes=self.num_classes,
            temperatures=self.temperatures,
            offsets=offsets,
            class_ids=class_ids_E,
            # + 0 turns the -0.0 of code 0 into 0.0: the content digest is over these bits.
            log_probs=log_probs_E.astype(np.float32) * -LOG_PROB_STEP + np.float32(0)
            if self.lossy
            else log_probs_E.astype(np.float32),
            tail_mass=self._decode_tails(tails_TK).reshape(num_frames, num_temperatures),
        )

    def _decode_tails(self, codes: npt.NDArray[np.generic]) -> Float32:
        return _TAIL_TABLE[codes] if self.lossy else codes.astype(np.float32)


def build_codec(spec: DatasetSpec) -> PackedCodec:
    max_entries = max_entries_per_frame(spec.selection, spec.num_classes)
    return PackedCodec(
        lossy=spec.codec == "packed-u8",
        num_classes=spec.num_classes,
        max_entries=max_entries,
        temperatures=spec.temperatures,
        count_dtype=np.dtype("u1" if max_entries <= 255 else "<u2"),
        id_dtype=np.dtype("<u2" if spec.num_classes <= 65_536 else "<u4"),
    )


def _view(
    streams: Mapping[str, bytes | memoryview], name: str, dtype: np.dtype[np.generic], length: int
) -> npt.NDArray[np.generic]:
    data = streams[name]
    if len(data) != length * dtype.itemsize:
        raise ValueError(f"stream '{name}' has {len(data)} bytes, expected {length} x {dtype.itemsize}")
    return np.frombuffer(data, dtype=dtype)
