"""Streams of "mtf-sqrt" with utterances changed, mostly of the lengths that their counts ask for."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import numpy as np

from softlabel_schemas.mtf_sqrt import MtfSqrtCodec
from softlabel_schemas.streams import Streams
from softlabel_schemas.targets import Int64, offsets_of
from tests.fuzz import seeds
from tests.fuzz.mutate import EXTREMES, mutate_bytes, mutate_values

# Of one utterance, by name.
Pieces = dict[str, bytes]

# Nibbles at which something begins: far positions, new classes, their high parts, long steps.
_NIBBLES = (0, 1, 9, 10, 11, 12, 13, 14, 15)


def forge(rng: Random, seed: seeds.StreamSeed) -> tuple[Streams, Int64]:
    """Streams and frame offsets."""
    utterances = pieces_of(seed.streams, len(seed.frame_offsets) - 1)
    frames_N = np.diff(seed.frame_offsets).tolist()
    for _ in range(rng.choice((1, 1, 2, 4))):
        index = rng.randrange(len(utterances))
        pieces = utterances[index]
        action = rng.randrange(10)
        if action == 0:
            other = rng.choice(utterances)
            name = rng.choice(sorted(pieces))
            pieces[name], other[name] = other[name], pieces[name]
        elif action == 1:
            frames_N[index] = max(0, frames_N[index] + rng.choice((-1, 1, 5)))
        else:
            name = rng.choice(sorted(pieces))
            pieces[name] = rng.choice(_CHANGES)(rng, pieces[name])
        if rng.random() < 0.8:
            _fit(rng, seed.codec, pieces, frames_N[index])
    streams = _joined(utterances, seed.codec.streams)
    if rng.random() < 0.05:
        name = rng.choice(seed.codec.streams)
        streams[name] = (streams[name][0], _cut_elsewhere(rng, streams[name][1]))
    return streams, offsets_of(frames_N)


def pieces_of(streams: Streams, num_utterances: int) -> list[Pieces]:
    return [
        {name: bytes(data[offsets[n] : offsets[n + 1]]) for name, (data, offsets) in streams.items()}
        for n in range(num_utterances)
    ]


def _joined(utterances: list[Pieces], names: tuple[str, ...]) -> Streams:
    return {
        name: (
            memoryview(b"".join(pieces[name] for pieces in utterances)),
            offsets_of([len(pieces[name]) for pieces in utterances]),
        )
        for name in names
    }


def _cut_elsewhere(rng: Random, offsets: Int64) -> Int64:
    moved = offsets.copy()
    index = rng.randrange(len(moved))
    moved[index] = moved[index] + rng.choice((-1, 1)) if rng.random() < 0.7 else rng.choice(EXTREMES) % 2**63
    return moved


def _change_nibble(rng: Random, data: bytes) -> bytes:
    if not data:
        return data
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 3))):
        index, shift = rng.randrange(len(data)), rng.choice((0, 4))
        changed[index] = changed[index] & (0xF0 >> shift) | rng.choice(_NIBBLES) << shift
    return bytes(changed)


def _nudge(rng: Random, data: bytes) -> bytes:
    """One value up by one, its neighbour down: the mass stays nearly what it was."""
    changed = bytearray(data)
    for index, step in zip(range(rng.randrange(len(data) + 1), len(data)), (1, -1), strict=False):
        changed[index] = (changed[index] + step) % 256
    return bytes(changed)


_CHANGES: tuple[Callable[[Random, bytes], bytes], ...] = (
    mutate_values,
    _change_nibble,
    _change_nibble,
    _nudge,
    lambda rng, data: rng.randbytes(len(data)),
    lambda rng, data: mutate_bytes(rng, data),
)


def _fit(rng: Random, codec: MtfSqrtCodec, pieces: Pieces, num_frames: int) -> None:
    """Cut and fill up the pieces whose lengths follow from the counts."""
    item = codec.count_dtype.itemsize
    counts = np.frombuffer(_resized(rng, pieces["counts"], num_frames * item), codec.count_dtype)
    counts = np.minimum(counts, codec.max_entries).astype(codec.count_dtype)
    pieces["counts"] = counts.tobytes()
    behind_first = np.maximum(counts.astype(np.int64) - 1, 0)
    sizes = {
        "positions": -(-int(counts.sum()) // 2),
        "first_codes": int((counts > 0).sum()),
        "head_steps": int(np.minimum(behind_first, 3).sum()),
        "tail_steps": -(-int(np.maximum(behind_first - 3, 0).sum()) // 2),
        "tail_mass": num_frames * len(codec.temperatures),
    }
    for name, size in sizes.items():
        pieces[name] = _resized(rng, pieces[name], size)


def _resized(rng: Random, data: bytes, size: int) -> bytes:
    """Filled up with zeros or anything."""
    missing = max(0, size - len(data))
    return data[:size] + (bytes(missing) if rng.random() < 0.5 else rng.randbytes(missing))
