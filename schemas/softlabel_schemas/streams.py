"""Streams: what a codec makes of labels and a container stores as columns; the checks that all codecs share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from softlabel_schemas.targets import Int64, offsets_of

# By name: the bytes of N utterances joined, and int64 [N + 1] offsets into them.
Streams = dict[str, tuple[memoryview, Int64]]


def check_streams(streams: Streams, names: Sequence[str], num_utterances: int) -> None:
    """Raises ValueError where streams are missing or are not cut into ``num_utterances`` pieces."""
    if set(streams) != set(names):
        raise ValueError(f"streams are {sorted(streams)}, expected {sorted(names)}")
    for name, (data, offsets) in streams.items():
        if (
            len(offsets) != num_utterances + 1
            or offsets[0] != 0
            or offsets[-1] != len(data)
            or (np.diff(offsets) < 0).any()
        ):
            raise ValueError(f"stream '{name}' of {len(data)} bytes is not cut into {num_utterances} utterances")


def check_lengths(streams: Streams, name: str, expected: Int64) -> None:
    """Each utterance's own bytes, not just their sum. Raises ValueError."""
    found = np.diff(streams[name][1])
    wrong = np.flatnonzero(found != expected)
    if len(wrong):
        first = int(wrong[0])
        raise ValueError(
            f"stream '{name}' has {found[first]} bytes for utterance {first} of the shard, expected {expected[first]}"
        )


def entry_offsets_of(counts: tuple[memoryview, Int64], dtype: np.dtype[Any], frame_offsets: Int64, limit: int) -> Int64:
    """Offsets of each frame's entries, int64 [T + 1], from the stream of their counts.

    Raises:
        ValueError: an utterance has not one count for each frame, or a count is above ``limit``.
    """
    check_lengths({"counts": counts}, "counts", np.diff(frame_offsets) * dtype.itemsize)
    counts_T = np.frombuffer(counts[0], dtype)
    if counts_T.max(initial=0) > limit:
        raise ValueError(f"a frame has {counts_T.max()} entries, the selection allows {limit}")
    return offsets_of(counts_T)
