"""Streams of "mtf-sqrt" by an attacker, one for each check of the compiled decoder; ``tests/fuzz`` looks for more."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from softlabel_schemas import mtf_kernels
from softlabel_schemas.codec import build_codec
from softlabel_schemas.mtf_sqrt import LOG_PROB_OF, PREDICTED, TAIL_OF
from softlabel_schemas.selection import TopK
from softlabel_schemas.streams import Streams
from softlabel_schemas.targets import offsets_of
from tests.support.datasets import SPEC

CODEC = build_codec(
    SPEC.model_copy(
        update={"codec": "mtf-sqrt", "num_classes": 900, "selection": TopK(k=80), "temperatures": (1.0, 2.0)}
    )
)
# Two frames: five classes, the last of which has a high part, then the fourth and the first of them again. The codes are 100,
# 90, 80, 70, 50, the last by a long step, and 170, 80.
HONEST: dict[str, list[int]] = {
    "counts": [5, 2],
    "positions": [0xDD, 0xED, 0x3F, 0x00],
    "new_ids": [7, 8, 9, 10, 9],
    "first_codes": [92, 22],
    "head_steps": [10, 10, 10, 90],
    "tail_steps": [0x0F],
    "overflow": [1, 5],
    "tail_mass": [0, 0, 100, 0],
}


def streams_of(pieces: dict[str, list[int]]) -> Streams:
    return {name: (memoryview(bytes(values)), offsets_of([len(values)])) for name, values in pieces.items()}


def decode(pieces: dict[str, list[int]]) -> Any:
    return CODEC.decode(streams_of(pieces), offsets_of([2]))


def test_honest_streams_are_decoded() -> None:
    targets = decode(HONEST).validate(mass_tolerance=CODEC.mass_tolerance)
    assert targets.class_ids.tolist() == [7, 8, 9, 266, 777, 266, 7]
    codes = np.array([100, 90, 80, 70, 50, 170, 80])
    np.testing.assert_array_equal(targets.log_probs, (2 * np.log(codes / 192)).astype(np.float32))


HOSTILE: dict[str, tuple[dict[str, list[int]], str]] = {
    "no new id": ({"new_ids": [7, 8, 9, 10]}, "frame 0: a stream ends before the frame's entries do"),
    "no high part": ({"overflow": []}, "frame 0: a stream ends before the frame's entries do"),
    "no long step": ({"overflow": [1]}, "frame 0: a stream ends before the frame's entries do"),
    "no far position": ({"positions": [0xDD, 0xED, 0xCF, 0x00]}, "frame 1: a stream ends before"),
    "no first code": ({"first_codes": [92]}, "frame 1: a stream ends before the frame's entries do"),
    "no steps": ({"head_steps": [10, 10, 10]}, "frame 1: a stream ends before the frame's entries do"),
    "no further steps": ({"tail_steps": []}, "frame 0: a stream ends before the frame's entries do"),
    "an id too many": ({"new_ids": [7, 8, 9, 10, 9, 0]}, "frame 0: the streams of the utterance .* are longer"),
    "overflow too long": ({"overflow": [1, 5, 0]}, "frame 0: the streams of the utterance .* are longer"),
    "a first code too many": ({"first_codes": [92, 22, 0]}, "frame 0: the streams of the utterance .* are longer"),
    "a step too many": ({"head_steps": [10, 10, 10, 90, 0]}, "frame 0: the streams of the utterance .* are longer"),
    "two steps too many": ({"tail_steps": [0x0F, 0]}, "frame 0: the streams of the utterance .* are longer"),
    "a position in no list": ({"positions": [0x0D, 0xED, 0x3F, 0x00]}, "frame 0: a position is beyond"),
    "a position beyond the list": ({"positions": [0xDD, 0xED, 0x5F, 0x00]}, "frame 1: a position is beyond"),
    "a position beyond what is left": ({"positions": [0xDD, 0xED, 0x3F, 0x04]}, "frame 1: a position is beyond"),
    "a far position": ({"positions": [0xDD, 0xED, 0xAF, 0x00]}, "frame 1: a position is beyond"),
    "a farther position": (
        {"positions": [0xDD, 0xED, 0xCF, 0x00], "overflow": [1, 5, 255]},
        "frame 1: a position is beyond",
    ),
    "an unknown class": ({"overflow": [2, 5]}, "frame 0: a class id is not below the number of classes"),
    "a class twice": ({"new_ids": [7, 7, 9, 10, 9]}, "frame 0: a class is kept twice"),
    "a class again and new": (
        {"positions": [0xDD, 0xED, 0x3F, 0x0E], "new_ids": [7, 8, 9, 10, 9, 10]},
        "frame 1: a class is kept twice",
    ),
    "a first code below 0": ({"first_codes": [193, 22]}, "frame 0: probability codes fall below 0"),
    "a step below 0": ({"head_steps": [10, 90, 10, 90]}, "frame 0: probability codes fall below 0"),
    "a long step below 0": ({"overflow": [1, 56]}, "frame 0: probability codes fall below 0"),
    "a tail of 1": ({"tail_mass": [0, 0, 255, 0]}, "frame 0: the tail mass beside an entry is 1"),
    "another mass": ({"tail_mass": [0, 20, 100, 0]}, r"frame 1: kept mass and tail mass do not add up to 1"),
    "a nibble too few": (
        {"positions": [0xDD, 0xED, 0x3F]},
        "stream 'positions' has 3 bytes for utterance 0 of",
    ),
    "a tail too few": (
        {"tail_mass": [0, 0, 100]},
        "stream 'tail_mass' has 3 bytes for utterance 0 of",
    ),
    "entries without end": ({"counts": [81, 2]}, "a frame has 81 entries, the selection allows 80"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_streams_are_refused(name: str) -> None:
    change, message = HOSTILE[name]
    with pytest.raises(ValueError, match=f"^{message}"):
        decode(HONEST | change)


def test_a_wrong_position_does_not_lead_outside_of_the_stamps() -> None:
    """It is noticed when its frame ends; until then it stands for what was not written yet, which may be negative."""
    streams = streams_of({"counts": [2], "positions": [0x00], "new_ids": [0], "first_codes": [0], "head_steps": [0]})
    empty = np.zeros(0, np.uint8)
    around = np.full(2700, -1, np.int64)
    status = mtf_kernels.decode_frames(
        offsets_of([1]),
        offsets_of([2]),
        *(np.frombuffer(streams[name][0], np.uint8) for name in ("positions", "new_ids", "first_codes", "head_steps")),
        *(empty, empty, np.zeros(1, np.uint8)),
        np.stack([offsets_of([size]) for size in (1, 0, 1, 1, 0, 0, 1)]),
        *(LOG_PROB_OF, TAIL_OF, PREDICTED),
        around[900:1800],
        *(900, 1, 0.1),
        np.full(2, -1, np.int32),
        np.empty(2, np.float32),
        np.empty((1, 1), np.float32),
    )
    assert status == (mtf_kernels.BAD_POSITION, 0)
    assert (around == -1).all()
