"""Codecs: soft targets <-> byte streams, encode beside decode, with a stated error bound.

A codec turns the targets of consecutive utterances into a few named byte streams, cut at the utterances; a shard stores each
stream as a column. Every utterance's bytes stand for themselves, and those of many are decoded at once, which is what
makes reading fast. On real senone posteriors, top-20, in a Parquet shard:

* ``mtf-sqrt`` (:mod:`softlabel_schemas.mtf_sqrt`), the default: the fewest bytes at a mean KL below 1e-4 nats;
* ``packed-u8``: simpler, as exact, twice the bytes;
* ``packed-f32``: loses nothing, four times the bytes.

Figures: tests/benchmarks/README.md. All numbers are little-endian.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from softlabel_schemas.mtf_sqrt import MtfSqrtCodec
from softlabel_schemas.selection import max_entries_per_frame
from softlabel_schemas.spec import DatasetSpec
from softlabel_schemas.streams import Streams, check_lengths, check_streams, entry_offsets_of
from softlabel_schemas.targets import RAW_MASS_TOLERANCE, Float32, Int64, SoftTargets, offsets_of

# 1/16 nat: a power of two, so that decoding is exact in float32 in every language.
LOG_PROB_STEP = np.float32(1 / 16)
TAIL_LEVELS = 65_535
_TAIL_TABLE = ((np.arange(TAIL_LEVELS + 1, dtype=np.float64) / TAIL_LEVELS) ** 2).astype(np.float32)


class Codec(Protocol):
    """What shards are made with."""

    @property
    def num_classes(self) -> int: ...

    @property
    def max_entries(self) -> int:
        """Of a frame."""

    @property
    def temperatures(self) -> tuple[float, ...]: ...

    @property
    def streams(self) -> tuple[str, ...]:
        """Their names, in the order in which they are stored."""

    @property
    def zstd_level(self) -> int:
        """At which its streams take the fewest bytes, or hardly more."""

    @property
    def mass_tolerance(self) -> float:
        """How far kept mass + tail mass of decoded targets may be from 1."""

    def least_bytes(self, num_entries: int) -> float:
        """What frames of so many entries each take on average in the largest of the streams, at the least: bytes a frame,
        before compression."""

    def encode(self, targets: SoftTargets, frame_offsets: Int64) -> Streams:
        """The streams of the utterances that begin at ``frame_offsets`` [N + 1]; :func:`check_encodable` comes first.

        Raises:
            ValueError: the targets break an invariant.
        """

    def decode(self, streams: Streams, frame_offsets: Int64) -> SoftTargets:
        """Targets of all utterances, every invariant checked; the streams may come from a stranger.

        Raises:
            ValueError: they do not fit the frames or each other, or break an invariant.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedCodec:
    """Four planar streams: entries per frame, class ids, log-probabilities, tail masses.

    Attributes:
        lossy: "packed-u8" when true, "packed-f32" otherwise.
        count_dtype: u1 where the selection allows at most 255 entries a frame, else u2.
        id_dtype: u2 for at most 65,536 classes, else u4.

    Error bound of "packed-u8": a log-probability of at least -15.9375 is off by at most 1/32 nat, smaller ones become
    -15.9375; the square root of a tail mass is off by at most 1/131070 (1/65535 for a tail above 0.99998), and
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

    @property
    def streams(self) -> tuple[str, ...]:
        return ("counts", "class_ids", "log_probs", "tail_mass")

    @property
    def zstd_level(self) -> int:
        return 3

    def least_bytes(self, num_entries: int) -> float:
        of_entry = max(self.id_dtype.itemsize, self.log_prob_dtype.itemsize)
        return max(num_entries * of_entry, self.tail_dtype.itemsize * len(self.temperatures))

    def encode(self, targets: SoftTargets, frame_offsets: Int64) -> Streams:
        targets.validate()
        counts_T = targets.counts_T
        log_probs: npt.NDArray[np.generic] = targets.log_probs
        tails: npt.NDArray[np.generic] = targets.tail_mass
        if self.lossy:
            log_probs = np.clip(np.rint(targets.log_probs / -LOG_PROB_STEP), 0, 255)
            # A frame with entries keeps a tail below 1, or its posterior at another temperature would be lost.
            highest_T1 = np.where(counts_T > 0, TAIL_LEVELS - 1, TAIL_LEVELS)[:, None]
            tails = np.minimum(np.rint(np.sqrt(targets.tail_mass.astype(np.float64)) * TAIL_LEVELS), highest_T1)
        columns = {
            "counts": counts_T.astype(self.count_dtype),
            "class_ids": targets.class_ids.astype(self.id_dtype),
            "log_probs": log_probs.astype(self.log_prob_dtype),
            "tail_mass": tails.astype(self.tail_dtype),
        }
        lengths = self._lengths(frame_offsets, targets.offsets)
        return {name: (memoryview(values.tobytes()), offsets_of(lengths[name])) for name, values in columns.items()}

    def decode(self, streams: Streams, frame_offsets: Int64) -> SoftTargets:
        check_streams(streams, self.streams, len(frame_offsets) - 1)
        offsets = entry_offsets_of(streams["counts"], self.count_dtype, frame_offsets, self.max_entries)
        for name, lengths in self._lengths(frame_offsets, offsets).items():
            check_lengths(streams, name, lengths)
        class_ids_E = np.frombuffer(streams["class_ids"][0], self.id_dtype).astype(np.int32)
        log_probs_E = np.frombuffer(streams["log_probs"][0], self.log_prob_dtype)
        tails_TK = np.frombuffer(streams["tail_mass"][0], self.tail_dtype)
        targets = SoftTargets(
            num_classes=self.num_classes,
            temperatures=self.temperatures,
            offsets=offsets,
            class_ids=class_ids_E,
            # + 0 turns the -0.0 of code 0 into 0.0: the content digest is over these bits.
            log_probs=log_probs_E.astype(np.float32) * -LOG_PROB_STEP + np.float32(0)
            if self.lossy
            else log_probs_E.astype(np.float32),
            tail_mass=self._decode_tails(tails_TK).reshape(len(offsets) - 1, len(self.temperatures)),
        )
        return targets.validate(mass_tolerance=self.mass_tolerance)

    def _lengths(self, frame_offsets: Int64, entry_offsets: Int64) -> dict[str, Int64]:
        """Bytes of each utterance in each stream, int64 [N]."""
        frames_N, entries_N = np.diff(frame_offsets), np.diff(entry_offsets[frame_offsets])
        return {
            "counts": frames_N * self.count_dtype.itemsize,
            "class_ids": entries_N * self.id_dtype.itemsize,
            "log_probs": entries_N * self.log_prob_dtype.itemsize,
            "tail_mass": frames_N * (self.tail_dtype.itemsize * len(self.temperatures)),
        }

    def _decode_tails(self, codes: npt.NDArray[np.generic]) -> Float32:
        return _TAIL_TABLE[codes] if self.lossy else codes.astype(np.float32)


def build_codec(spec: DatasetSpec) -> Codec:
    max_entries = max_entries_per_frame(spec.selection, spec.num_classes)
    common: dict[str, Any] = {
        "num_classes": spec.num_classes,
        "max_entries": max_entries,
        "temperatures": spec.temperatures,
        "count_dtype": np.dtype("u1" if max_entries <= 255 else "<u2"),
    }
    if spec.codec == "mtf-sqrt":
        return MtfSqrtCodec(**common)
    id_dtype = np.dtype("<u2" if spec.num_classes <= 65_536 else "<u4")
    return PackedCodec(lossy=spec.codec == "packed-u8", id_dtype=id_dtype, **common)


def check_encodable(targets: SoftTargets, codec: Codec) -> None:
    """Raises ValueError where the targets are not of the codec's dataset (nothing ever wraps)."""
    highest = int(targets.counts_T.max(initial=0))
    if highest > codec.max_entries:
        raise ValueError(f"a frame has {highest} entries, the selection allows {codec.max_entries}")
    if targets.num_classes != codec.num_classes or targets.temperatures != codec.temperatures:
        raise ValueError(
            f"targets have {targets.num_classes} classes at temperatures {targets.temperatures}, the dataset "
            f"{codec.num_classes} at {codec.temperatures}"
        )
