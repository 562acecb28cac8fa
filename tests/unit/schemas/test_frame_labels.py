"""Hard labels on the front end's frames, from alignments with frames of their own."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from softlabel_schemas.frame_labels import (
    AlignedItem,
    NumFramesError,
    frames_of_items,
    middle_of_stack,
    nearest_frames,
    on_frames,
)
from softlabel_schemas.front_end import Fbank


@given(num_theirs=st.integers(1, 30), num_ours=st.integers(0, 30), window=st.floats(1.0, 5.0))
def test_the_nearest_frame_has_the_nearest_centre(num_theirs: int, num_ours: int, window: float) -> None:
    centres_of_theirs = np.arange(num_theirs) + window / 2
    for ours, theirs in enumerate(nearest_frames(num_theirs, num_ours, window)):
        distances = np.abs(centres_of_theirs - (ours + 0.5))
        assert distances[theirs] == pytest.approx(distances.min())


@given(num_samples=st.integers(400, 5_000), sample_rate=st.sampled_from([8_000, 16_000]))
def test_an_alignment_of_our_frames_stays_and_one_of_kaldis_is_shifted_by_one(
    num_samples: int, sample_rate: int
) -> None:
    front_end = Fbank(sample_rate=sample_rate)
    num_frames = front_end.num_frames(num_samples)
    labels = np.arange(num_frames, dtype=np.int32)
    np.testing.assert_array_equal(on_frames(labels, num_samples, front_end), labels)
    # https://kaldi-asr.org/doc/feature-window_8h.html, NumFrames
    num_whole = 1 + (num_samples - sample_rate // 40) // (sample_rate // 100)
    assert num_whole == num_frames - 2
    found = on_frames(np.arange(num_whole, dtype=np.int32), num_samples, front_end)
    np.testing.assert_array_equal(found, np.clip(labels - 1, 0, num_whole - 1))


@pytest.mark.parametrize("length", [0, 97, 99, 101])
def test_an_alignment_of_another_length(length: int) -> None:
    with pytest.raises(NumFramesError, match=rf"{length} frames, expected 100 \(98 with snip_edges\)"):
        on_frames(np.zeros(length, np.int32), 16_000, Fbank())


def test_audio_too_short_for_one_of_kaldis_frames() -> None:
    assert on_frames(np.zeros(1, np.int32), 160, Fbank()).tolist() == [0]
    with pytest.raises(NumFramesError):
        on_frames(np.zeros(0, np.int32), 160, Fbank())


@given(
    borders=st.lists(st.integers(0, 400), min_size=1, max_size=6, unique=True).map(sorted),
    frame_shift_ms=st.sampled_from([10.0, 30.0, 12.5]),
)
def test_a_frame_has_the_item_at_its_centre(borders: list[int], frame_shift_ms: float) -> None:
    items = [
        AlignedItem(str(index), start / 1000, stop / 1000) for index, (start, stop) in enumerate(pairwise(borders))
    ]
    ids = {str(index): index for index in range(len(items))}
    found = frames_of_items(items, ids, 30, frame_shift_ms)
    for frame, label in enumerate(found):
        centre = (frame + 0.5) * frame_shift_ms
        holding = [
            ids[item.name] for item in items if 1000 * item.start <= centre - 1e-6 and centre + 1e-6 < 1000 * item.end
        ]
        nearby = [ids[item.name] for item in items if 1000 * item.start - 1e-6 <= centre <= 1000 * item.end + 1e-6]
        # On a border either is right, but for the first and the last where there may be none.
        assert label in (holding or [*nearby, -1])


def test_an_item_that_ends_long_after_the_utterance() -> None:
    items = [AlignedItem("a", -1e308, 0.01), AlignedItem("b", 0.01, 1e308)]
    assert frames_of_items(items, {"a": 0, "b": 1}, 3, 10.0).tolist() == [0, 1, 1]


def test_a_name_without_an_id() -> None:
    with pytest.raises(KeyError, match="zh"):
        frames_of_items([AlignedItem("zh", 0.0, 1.0)], {"sh": 0}, 3, 10.0)


@pytest.mark.parametrize(
    ("stack", "expected"), [(1, [0, 1, 2, 3, 4, 5, 6]), (2, [1, 3, 5, 6]), (3, [1, 4, 6]), (8, [4]), (16, [6])]
)
def test_the_middle_of_a_stack(stack: int, expected: list[int]) -> None:
    assert middle_of_stack(np.arange(7), stack).tolist() == expected
    assert len(expected) == Fbank(stack=stack).num_frames(7 * 160)
