"""SoftTargets: the kept part of each frame's posterior, ragged.

Shape suffixes: T frames, E kept entries of all frames together, K temperatures, M the largest number of entries of a
frame. Log-probabilities are natural, **raw** (never renormalised over the kept entries) and at temperature 1; the tail
mass says what was left out, once per stored temperature.

The posterior at temperature tau is p_tau(i) = p(i)^(1/tau) / Z_tau. The kept entries alone do not give Z_tau, the tail
mass m_tau does: Z_tau = sum over kept of p(i)^(1/tau) / (1 - m_tau).
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from softlabel_schemas.errors import InputError

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]

# What float32 softmax over some ten thousand classes and its sum may be off by, with room.
RAW_MASS_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True, eq=False)
class SoftTargets:
    """Soft targets of consecutive frames.

    Attributes:
        num_classes: size of the class inventory.
        temperatures: those for which a tail mass is stored; the first is 1.0.
        offsets: int64 [T + 1]; entries of frame t are ``offsets[t]:offsets[t + 1]``.
        class_ids: int32 [E]; within a frame distinct, by falling probability.
        log_probs: float32 [E]; within a frame never rising.
        tail_mass: float32 [T, K]; probability outside the kept entries at each temperature.
    """

    num_classes: int
    temperatures: tuple[float, ...]
    offsets: Int64
    class_ids: Int32
    log_probs: Float32
    tail_mass: Float32

    @property
    def num_frames(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_entries(self) -> int:
        return len(self.class_ids)

    @property
    def counts_T(self) -> Int64:
        return np.diff(self.offsets)

    def validate(self, *, mass_tolerance: float = RAW_MASS_TOLERANCE) -> SoftTargets:
        """Check every invariant; returns self.

        Args:
            mass_tolerance: how far kept mass + tail mass may be from 1 (a codec states its own).

        Raises:
            ValueError: names the invariant, the frame and the value found.
        """
        num_frames, num_entries = self.num_frames, self.num_entries
        shape = (num_frames, len(self.temperatures))
        _require(self.tail_mass.shape == shape, f"tail_mass has shape {self.tail_mass.shape}, expected {shape}")
        _require(len(self.log_probs) == num_entries, f"{len(self.log_probs)} log_probs for {num_entries} class_ids")
        _require(bool(self.temperatures) and self.temperatures[0] == 1.0, "the first temperature must be 1.0")
        _require(int(self.offsets[0]) == 0 and int(self.offsets[-1]) == num_entries, "offsets do not span the entries")
        counts_T = self.counts_T
        _require(not (counts_T < 0).any(), "offsets fall")
        _require(not (self.class_ids < 0).any(), "a class id is negative")
        if num_entries and int(self.class_ids.max()) >= self.num_classes:
            raise ValueError(f"class id {int(self.class_ids.max())} found, but there are {self.num_classes} classes")
        frames_E = np.repeat(np.arange(num_frames, dtype=np.int64), counts_T)
        check_distinct(self.class_ids, self.offsets, self.num_classes)
        _first_bad(~np.isfinite(self.log_probs) | (self.log_probs > 0), frames_E, self.log_probs, "log_prob", "<= 0")
        rising = np.zeros(num_entries, dtype=bool)
        rising[1:] = (self.log_probs[1:] > self.log_probs[:-1]) & (frames_E[1:] == frames_E[:-1])
        _first_bad(rising, frames_E, self.log_probs, "log_prob", "not above the entry before it")
        tails = self.tail_mass
        outside_TK = ~((tails >= 0) & (tails <= 1))
        frames_TK = np.repeat(np.arange(num_frames), tails.shape[1])
        _first_bad(outside_TK.ravel(), frames_TK, tails.ravel(), "tail_mass", "within [0, 1]")
        total_T = self.kept_mass_T() + tails[:, 0]
        off = np.abs(total_T - 1) > mass_tolerance
        _first_bad(off, np.arange(num_frames), total_T, "kept mass + tail mass", f"1 within {mass_tolerance:g}")
        return self

    def kept_mass_T(self) -> npt.NDArray[np.float64]:
        """Probability of the kept entries at temperature 1, float64 [T]."""
        return segment_sum(np.exp(self.log_probs.astype(np.float64)), self.offsets)

    def keys_E(self) -> Int64:
        """Frame and class of each entry as one number, frame * num_classes + class, int64 [E]."""
        frames_E = np.repeat(np.arange(self.num_frames, dtype=np.int64), self.counts_T)
        return frames_E * self.num_classes + self.class_ids

    def top1_T(self) -> Int32:
        """The likeliest class of each frame, int32 [T]; -1 for a frame with no entry."""
        top = np.full(self.num_frames, -1, dtype=np.int32)
        filled = self.counts_T > 0
        top[filled] = self.class_ids[self.offsets[:-1][filled]]
        return top

    def frames(self, start: int, stop: int) -> SoftTargets:
        """Frames ``start:stop`` as views, without a copy of the entries."""
        first, last = int(self.offsets[start]), int(self.offsets[stop])
        return SoftTargets(
            num_classes=self.num_classes,
            temperatures=self.temperatures,
            offsets=self.offsets[start : stop + 1] - first,
            class_ids=self.class_ids[first:last],
            log_probs=self.log_probs[first:last],
            tail_mass=self.tail_mass[start:stop],
        )

    def at_temperature(self, temperature: float) -> tuple[Float32, Float32]:
        """Log-probabilities float32 [E] and tail mass float32 [T] at ``temperature``.

        Of decoded targets as exact as their codec allows: ``tempering.check_tempered`` says where that is not enough.

        Raises:
            InputError: no tail was stored for this temperature, so its posterior cannot be derived.
        """
        if temperature not in self.temperatures:
            raise InputError(
                f"temperature {temperature:g} cannot be derived: tails are stored for "
                f"{', '.join(f'{t:g}' for t in self.temperatures)}; label again with it in 'temperatures'"
            )
        tail_T = self.tail_mass[:, self.temperatures.index(temperature)]
        if temperature == 1.0:
            return self.log_probs, tail_T
        scaled_E = self.log_probs.astype(np.float64) / temperature
        kept_T = segment_sum(np.exp(scaled_E), self.offsets)
        # A frame without entries gives -inf - -inf, and no entry to use it on.
        with np.errstate(divide="ignore", invalid="ignore"):
            log_z_T = np.log(kept_T) - np.log1p(-tail_T.astype(np.float64))
        return (scaled_E - np.repeat(log_z_T, self.counts_T)).astype(np.float32), tail_T

    def padded(self) -> tuple[Int32, Float32]:
        """class_ids int32 [T, M] padded with 0, log_probs float32 [T, M] padded with -inf."""
        counts_T = self.counts_T
        width = int(counts_T.max(initial=0))
        mask_TM = np.arange(width) < counts_T[:, None]
        ids_TM = np.zeros(mask_TM.shape, dtype=np.int32)
        log_probs_TM = np.full(mask_TM.shape, -np.inf, dtype=np.float32)
        ids_TM[mask_TM] = self.class_ids
        log_probs_TM[mask_TM] = self.log_probs
        return ids_TM, log_probs_TM

    def keep(self, kept_E: npt.NDArray[np.bool_]) -> SoftTargets:
        """Only the entries where ``kept_E`` [E] is true; what is dropped moves to the tail at every temperature."""
        tail_mass = self.tail_mass.astype(np.float64)
        for column, temperature in enumerate(self.temperatures):
            log_probs_E, _ = self.at_temperature(temperature)
            dropped_E = np.where(kept_E, 0.0, np.exp(log_probs_E.astype(np.float64)))
            tail_mass[:, column] += segment_sum(dropped_E, self.offsets)
        counts_T = segment_sum(kept_E.astype(np.float64), self.offsets).astype(np.int64)
        return SoftTargets(
            num_classes=self.num_classes,
            temperatures=self.temperatures,
            offsets=offsets_of(counts_T),
            class_ids=self.class_ids[kept_E],
            log_probs=self.log_probs[kept_E],
            tail_mass=np.clip(tail_mass, 0.0, 1.0).astype(np.float32),
        )


def offsets_of(counts: npt.ArrayLike) -> Int64:
    """Running sum with a leading zero, int64 [len(counts) + 1]."""
    counts = np.asarray(counts, dtype=np.int64)
    offsets = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets


def check_distinct(class_ids: Int32, offsets: Int64, num_classes: int) -> None:
    """Raises ValueError where a class is kept twice in a frame; ids are in 0 .. num_classes - 1."""
    frames_E = np.repeat(np.arange(len(offsets) - 1, dtype=np.int64), np.diff(offsets))
    keys_E = np.sort(frames_E * num_classes + class_ids)
    repeated = np.flatnonzero(keys_E[1:] == keys_E[:-1])
    if len(repeated):
        frame, class_id = divmod(int(keys_E[repeated[0]]), num_classes)
        raise ValueError(f"frame {frame}: class id {class_id} is kept twice")


def segment_sum(values_E: npt.NDArray[np.float64], offsets: Int64) -> npt.NDArray[np.float64]:
    """Sum of each segment, float64 [T]; an empty segment sums to 0.

    ``np.add.reduceat`` adds within a segment only: differences of a running sum would cancel over long inputs.
    """
    sums = np.zeros(len(offsets) - 1)
    filled = offsets[1:] > offsets[:-1]
    if filled.any():
        sums[filled] = np.add.reduceat(values_E, offsets[:-1][filled])
    return sums


def concatenate(parts: Sequence[SoftTargets]) -> SoftTargets:
    """One SoftTargets of all frames in order. Raises ValueError on differing class counts or temperatures."""
    first = parts[0]
    for part in parts:
        if (part.num_classes, part.temperatures) != (first.num_classes, first.temperatures):
            raise ValueError(
                f"cannot join targets of {part.num_classes} classes at temperatures {part.temperatures} "
                f"with {first.num_classes} classes at {first.temperatures}"
            )
    # One difference for all: a shard has a thousand parts.
    starts = np.cumsum([len(part.offsets) for part in parts[:-1]], dtype=np.int64)
    counts_T = np.delete(np.diff(np.concatenate([part.offsets for part in parts])), starts - 1)
    return SoftTargets(
        num_classes=first.num_classes,
        temperatures=first.temperatures,
        offsets=offsets_of(counts_T),
        class_ids=np.concatenate([part.class_ids for part in parts]),
        log_probs=np.concatenate([part.log_probs for part in parts]),
        tail_mass=np.concatenate([part.tail_mass for part in parts]),
    )


def labels_digest(utterance_id: str, targets: SoftTargets) -> bytes:
    """sha256 of one utterance's labels as readers see them; the byte layout is in FORMAT.md, "Content digest"."""
    encoded_id = utterance_id.encode()
    digest = hashlib.sha256(struct.pack("<III", len(encoded_id), targets.num_frames, len(targets.temperatures)))
    digest.update(encoded_id)
    digest.update(np.ascontiguousarray(targets.counts_T, dtype="<u4").tobytes())
    digest.update(np.ascontiguousarray(targets.class_ids, dtype="<u4").tobytes())
    digest.update(np.ascontiguousarray(targets.log_probs, dtype="<f4").tobytes())
    digest.update(np.ascontiguousarray(targets.tail_mass, dtype="<f4").tobytes())
    return digest.digest()


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _first_bad(
    bad: npt.NDArray[np.bool_],
    frames: npt.NDArray[np.int64],
    values: npt.NDArray[np.floating],
    name: str,
    expected: str,
) -> None:
    where = np.flatnonzero(bad)
    if len(where):
        first = int(where[0])
        raise ValueError(f"frame {int(frames[first])}: {name} {float(values[first]):g}, expected {expected}")
