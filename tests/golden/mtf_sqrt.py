"""A second decoder of the codec "mtf-sqrt", from FORMAT.md alone (section 7): plain Python, one utterance at a time.

It shares nothing with the package, so that both can be compared: over datasets (test_independent_reader.py) and over hostile
streams (tests/fuzz).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

STREAMS = ("counts", "positions", "new_ids", "first_codes", "head_steps", "tail_steps", "overflow", "tail_mass")
NIBBLES = ("positions", "tail_steps")
# Codes of a root of a probability are steps of 1/192, those of an angle of a tail mass steps of pi/510.
LEVELS = 192
LIST_SIZE = 64


class FormatError(Exception):
    """The bytes are not what FORMAT.md describes."""


def require(condition: object, message: str) -> None:
    if not condition:
        raise FormatError(message)


def log_prob_of(code: int) -> np.float32:
    return np.float32(2 * math.log((code or 0.25) / LEVELS))


def tail_of(code: int) -> np.float32:
    return np.float32(math.sin(code * math.pi / 510) ** 2)


def predicted_tail(codes: list[int]) -> int:
    """The tail code of what the codes of a frame leave over, rounded down from 0.7 on."""
    left = max(0, LEVELS**2 - sum(code * code for code in codes))
    return math.floor(math.asin(math.sqrt(left / LEVELS**2)) * 510 / math.pi + 0.3)


def mass_tolerance(max_entries: int) -> float:
    return 2 / 384 * math.sqrt(max_entries) + max_entries / 384**2 + math.pi / 510 + 0.001


@dataclass(frozen=True)
class Frames:
    """Labels of one utterance, frame by frame."""

    counts: list[int]
    class_ids: list[int] = field(default_factory=list)
    log_probs: list[np.float32] = field(default_factory=list)
    tail_mass: list[list[np.float32]] = field(default_factory=list)


class Symbols:
    """A stream of bytes, or of nibbles, the low one of a byte first."""

    def __init__(self, name: str, data: bytes) -> None:
        self._name, self._symbols, self._next = name, list(data), 0
        if name in NIBBLES:
            self._symbols = [nibble for byte in data for nibble in (byte & 15, byte >> 4)]

    def read(self) -> int:
        require(self._next < len(self._symbols), f"{self._name} is too short")
        self._next += 1
        return self._symbols[self._next - 1]

    def end(self) -> None:
        # The last byte of an odd number of nibbles is half filled.
        left = len(self._symbols) - self._next
        require(left == 0 or (left == 1 and self._name in NIBBLES), f"{self._name} is too long")


def decode(
    streams: Mapping[str, bytes], *, num_frames: int, num_classes: int, max_entries: int, num_temperatures: int
) -> Frames:
    """Raises FormatError."""
    require(set(streams) == set(STREAMS), "streams")
    count_dtype = np.dtype("u1" if max_entries <= 255 else "<u2")
    require(len(streams["counts"]) == num_frames * count_dtype.itemsize, "counts")
    frames = Frames(np.frombuffer(streams["counts"], count_dtype).tolist())
    require(max(frames.counts, default=0) <= max_entries, "more entries than the selection allows")
    require(len(streams["positions"]) == -(-sum(frames.counts) // 2), "positions")
    require(len(streams["tail_mass"]) == num_frames * num_temperatures, "tail_mass")
    symbols = {name: Symbols(name, streams[name]) for name in STREAMS[1:-1]}
    high_bytes = 0 if num_classes <= 768 else 1 if num_classes <= 66_048 else 3
    last_ids: list[int] = []
    last_tails = [0] * num_temperatures
    for frame, count in enumerate(frames.counts):
        last_ids = _class_ids(symbols, count, last_ids[:LIST_SIZE], high_bytes)
        require(len(set(last_ids)) == count and max(last_ids, default=0) < num_classes, "class ids")
        codes = _codes(symbols, count)
        differences = streams["tail_mass"][frame::num_frames]
        last_tails = [(a + b) % 256 for a, b in zip([predicted_tail(codes), *last_tails[1:]], differences, strict=True)]
        require(not count or 255 not in last_tails, "a tail mass of 1 beside entries")
        frames.class_ids.extend(last_ids)
        frames.log_probs.extend(map(log_prob_of, codes))
        frames.tail_mass.append([tail_of(code) for code in last_tails])
        mass = sum(((code or 0.25) / LEVELS) ** 2 for code in codes) + tail_of(last_tails[0])
        require(abs(mass - 1) <= mass_tolerance(max_entries), "mass")
    for stream in symbols.values():
        stream.end()
    return frames


def _class_ids(symbols: dict[str, Symbols], count: int, recent: list[int], high_bytes: int) -> list[int]:
    """``recent``: the classes of the frame before, those that were met again removed as they are."""
    ids = []
    for _ in range(count):
        nibble = symbols["positions"].read()
        if nibble >= 13:
            high = nibble - 13
            if nibble == 15:
                high += sum(symbols["overflow"].read() << 8 * byte for byte in range(high_bytes))
            ids.append(high << 8 | symbols["new_ids"].read())
        else:
            position = nibble + (symbols["overflow"].read() if nibble == 12 else 0)
            require(position < len(recent), "a position beyond the list")
            ids.append(recent.pop(position))
    return ids


def _codes(symbols: dict[str, Symbols], count: int) -> list[int]:
    code, codes = LEVELS, []
    for rank in range(count):
        if rank <= 3:
            code -= symbols["head_steps" if rank else "first_codes"].read()
        else:
            step = symbols["tail_steps"].read()
            code -= step + (symbols["overflow"].read() if step == 15 else 0)
        require(code >= 0, "a code below 0")
        codes.append(code)
    return codes
