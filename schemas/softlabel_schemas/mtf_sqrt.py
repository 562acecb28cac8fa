"""The codec "mtf-sqrt": half the bytes of "packed-u8" at the same error, since speech changes slowly.

* A class that stood among the last frame's is stored as its position there, less those met already (move-to-front): on real
  senone posteriors 60 to 75% of the entries, with positions that are mostly 0 to 3.
* A probability is stored as round(192 sqrt(p)), and that as the step down from the rank above. The divergence of a posterior
  from its decoded one grows with the squared error of sqrt(p), so equal steps there spend bits where they count.
* A tail mass is stored as the difference from what the codes leave over.

Small symbols share a byte. That leaves zstd's entropy coder fewer of them, and keeps its match finder from short accidental
matches, which cost more than they save: on the tuning posteriors 0.8 bytes a frame.

Error bound: the square root of a probability is off by at most 1/384 (and what rounds to 0 becomes (0.25/192)^2, since
log-probabilities are finite); the angle asin(sqrt(m)) of a tail mass m by at most pi/1020, or twice that for m above 0.9999.
Measured KL of a decoded posterior (renormalised) from the true one: about (M + 1) / (6 * 192^2) nats for M entries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from softlabel_schemas import mtf_kernels
from softlabel_schemas.mtf_kernels import LAST_HIGH, LEVELS, MAX_LIST, MAX_STAMPS
from softlabel_schemas.streams import Streams, check_lengths, check_streams, entry_offsets_of
from softlabel_schemas.targets import RAW_MASS_TOLERANCE, Int64, SoftTargets, check_distinct

UInt8 = npt.NDArray[np.uint8]

STREAMS = ("positions", "new_ids", "first_codes", "head_steps", "tail_steps", "overflow", "tail_mass")
# Tail codes are equal steps of the angle asin(sqrt(m)): of the masses inside and outside, neither is coarse near 0.
TAIL_LEVELS = 255
_HALF_STEP = 0.5 / LEVELS
_PROBLEMS = {
    mtf_kernels.CUT_SHORT: "a stream ends before the frame's entries do",
    mtf_kernels.LEFT_OVER: "the streams of the utterance that begins there are longer than its entries",
    mtf_kernels.BAD_POSITION: "a position is beyond the classes of the frame before",
    mtf_kernels.BAD_CLASS: "a class id is not below the number of classes",
    mtf_kernels.REPEATED: "a class is kept twice",
    mtf_kernels.RISING: "probability codes fall below 0",
    mtf_kernels.BAD_TAIL: "the tail mass beside an entry is 1",
    mtf_kernels.BAD_MASS: "kept mass and tail mass do not add up to 1",
}


def _tables() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], UInt8]:
    roots = np.arange(LEVELS + 1) / LEVELS
    roots[0] = 0.25 / LEVELS
    log_probs = (2 * np.log(roots)).astype(np.float32) + np.float32(0)
    tails = (np.sin(np.arange(TAIL_LEVELS + 1) * (math.pi / (2 * TAIL_LEVELS))) ** 2).astype(np.float32)
    # Rounded down from 0.7 on: no mass is so near to where it would round otherwise that libraries could differ.
    predicted = np.floor(_tail_angles(np.arange(LEVELS**2 + 1) / LEVELS**2) + 0.3)
    return log_probs, tails, predicted.astype(np.uint8)


def tail_codes(tail_mass: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """round(asin(sqrt(m)) x 510 / pi), as floats; NaN where m is not in 0 .. 1."""
    with np.errstate(invalid="ignore"):
        return np.rint(_tail_angles(tail_mass.astype(np.float64)))


def _tail_angles(tail_mass: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """In steps of the codes."""
    return np.arcsin(np.sqrt(tail_mass)) * (2 * TAIL_LEVELS / math.pi)


LOG_PROB_OF, TAIL_OF, PREDICTED = _tables()


@dataclass(frozen=True, kw_only=True, slots=True)
class MtfSqrtCodec:
    """See the module.

    Attributes:
        max_entries: of a frame.
        count_dtype: u1 where the selection allows at most 255 entries a frame, else u2.
    """

    num_classes: int
    max_entries: int
    temperatures: tuple[float, ...]
    count_dtype: np.dtype[np.unsignedinteger]

    @property
    def streams(self) -> tuple[str, ...]:
        return ("counts", *STREAMS)

    @property
    def zstd_level(self) -> int:
        """Higher ones look for repeats, which cost more than they save: the bytes tell by how often each occurs."""
        return 1

    @property
    def mass_tolerance(self) -> float:
        """How far kept mass + tail mass of decoded targets may be from 1: by Cauchy and Schwarz over the entries' errors of
        1/384, and the tail's."""
        kept = 2 * _HALF_STEP * math.sqrt(self.max_entries) + self.max_entries * _HALF_STEP**2
        return kept + math.pi / TAIL_LEVELS / 2 + RAW_MASS_TOLERANCE

    @property
    def high_bytes(self) -> int:
        """Of a new class id beyond what "positions" and "new_ids" hold: 0 up to 768 classes, 1 up to 66,048, else 3."""
        most = max(self.num_classes - 1 >> 8, mtf_kernels.LAST_HIGH) - mtf_kernels.LAST_HIGH
        return 0 if most == 0 else 1 if most < 256 else 3

    def least_bytes(self, num_entries: int) -> float:
        """Nibbles of "positions", bytes of "tail_mass", and of "new_ids" and "overflow" what the last frame's classes leave at
        best."""
        num_new = max(num_entries - MAX_LIST, 0)
        num_high = max(num_new - (LAST_HIGH << 8), 0)
        return max(num_entries / 2, len(self.temperatures), num_new, num_high * self.high_bytes)

    def encode(self, targets: SoftTargets, frame_offsets: Int64) -> Streams:
        num_utterances, num_entries = len(frame_offsets) - 1, targets.num_entries
        codes_TK = tail_codes(targets.tail_mass)
        if np.isnan(codes_TK).any():
            targets.validate()
        # A frame with entries keeps a tail below 1, or its posterior at another temperature would be lost.
        filled_T1 = (targets.counts_T > 0)[:, None]
        codes_TK = np.minimum(codes_TK, np.where(filled_T1, TAIL_LEVELS - 1, TAIL_LEVELS)).astype(np.uint8)
        room = {
            "positions": num_entries + num_utterances,
            "new_ids": num_entries,
            "first_codes": targets.num_frames,
            "head_steps": num_entries,
            "tail_steps": num_entries + num_utterances,
            "overflow": (2 + self.high_bytes) * num_entries,
            "tail_mass": codes_TK.size,
        }
        buffers = {name: np.empty(size, np.uint8) for name, size in room.items()}
        ends = np.zeros((len(STREAMS), num_utterances + 1), np.int64)
        status, frame = mtf_kernels.encode_frames(
            frame_offsets,
            targets.offsets,
            _readonly(targets.class_ids),
            _readonly(targets.log_probs),
            _readonly(targets.tail_mass),
            codes_TK,
            PREDICTED,
            self._stamps(),
            self.num_classes,
            self.high_bytes,
            RAW_MASS_TOLERANCE,
            *(buffers[name] for name in STREAMS),
            ends,
        )
        if status != mtf_kernels.GOOD or self.num_classes > MAX_STAMPS:
            targets.validate()
        if status != mtf_kernels.GOOD:
            raise ValueError(f"frame {frame}: the targets are not valid")
        counts = targets.counts_T.astype(self.count_dtype)
        streams: Streams = {"counts": (memoryview(counts.tobytes()), frame_offsets * counts.itemsize)}
        for name, own_ends in zip(STREAMS, ends, strict=True):
            streams[name] = (memoryview(buffers[name][: own_ends[-1]].tobytes()), own_ends)
        return streams

    def decode(self, streams: Streams, frame_offsets: Int64) -> SoftTargets:
        check_streams(streams, self.streams, len(frame_offsets) - 1)
        offsets = entry_offsets_of(streams["counts"], self.count_dtype, frame_offsets, self.max_entries)
        entries_N = np.diff(offsets[frame_offsets])
        num_entries, num_temperatures = int(offsets[-1]), len(self.temperatures)
        # Before anything is allocated for them: a nibble for each entry.
        check_lengths(streams, "positions", (entries_N + 1) >> 1)
        check_lengths(streams, "tail_mass", np.diff(frame_offsets) * num_temperatures)
        class_ids = np.empty(num_entries, np.int32)
        log_probs = np.empty(num_entries, np.float32)
        tail_mass = np.empty((len(offsets) - 1, num_temperatures), np.float32)
        status, frame = mtf_kernels.decode_frames(
            frame_offsets,
            offsets,
            *(_bytes(streams[name][0], padding=self.max_entries if name == "new_ids" else 0) for name in STREAMS),
            np.stack([streams[name][1] for name in STREAMS]),
            LOG_PROB_OF,
            TAIL_OF,
            PREDICTED,
            self._stamps(),
            self.num_classes,
            self.high_bytes,
            self.mass_tolerance,
            class_ids,
            log_probs,
            tail_mass,
        )
        if status != mtf_kernels.GOOD:
            raise ValueError(f"frame {frame}: {_PROBLEMS[status]}")
        if self.num_classes > MAX_STAMPS:
            check_distinct(class_ids, offsets, self.num_classes)
        return SoftTargets(
            num_classes=self.num_classes,
            temperatures=self.temperatures,
            offsets=offsets,
            class_ids=class_ids,
            log_probs=log_probs,
            tail_mass=tail_mass,
        )

    def _stamps(self) -> Int64:
        return np.full(self.num_classes if self.num_classes <= MAX_STAMPS else 0, -1, np.int64)


def _bytes(data: memoryview, *, padding: int) -> UInt8:
    array = np.frombuffer(data, np.uint8)
    return _readonly(np.append(array, np.zeros(padding, np.uint8)) if padding else array)


def _readonly(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A contiguous view that cannot be written to: kernels are compiled for each kind of array, so they get one kind."""
    view = np.ascontiguousarray(array).view()
    view.flags.writeable = False
    return view
