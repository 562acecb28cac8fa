"""Batches: what is in them, and how much of them is padding."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_service.batching import batch_rows, pad


@settings(max_examples=100)
@given(
    seconds=st.lists(st.sampled_from([0.3, 1.0, 2.5, 2.5000001, 7.0, 40.0]), max_size=60),
    batch_seconds=st.sampled_from([0.1, 2.5, 10.0, 120.0]),
)
def test_every_row_once_and_no_batch_above_the_limit(seconds: list[float], batch_seconds: float) -> None:
    seconds_N = np.array(seconds, dtype=np.float64)
    batches = batch_rows(seconds_N, batch_seconds)
    assert sorted(row for batch in batches for row in batch) == list(range(len(seconds)))
    for batch in batches:
        assert len(batch) == 1 or seconds_N[batch].max() * len(batch) <= batch_seconds
    assert batches == batch_rows(seconds_N.copy(), batch_seconds)
    longest = [seconds_N[batch].max() for batch in batches]
    assert longest == sorted(longest, reverse=True)


def test_rows_of_equal_length_stay_in_order() -> None:
    assert batch_rows(np.array([1.0, 2.0, 1.0, 2.0, 1.0]), 4.0) == [[1, 3], [0, 2, 4]]
    # Sorts that do not keep the order of equals keep it in short inputs.
    longer, shorter = batch_rows(np.tile([1.0, 2.0], 150), 300.0)
    assert (longer, shorter) == (list(range(1, 300, 2)), list(range(0, 300, 2)))


def padding_share(seconds_N: npt.NDArray[np.float64], batches: list[list[int]]) -> float:
    padded = sum(seconds_N[batch].max() * len(batch) for batch in batches)
    return float(1 - seconds_N.sum() / padded)


def test_padding_is_a_small_part_of_a_shard_of_read_speech() -> None:
    """Two hours of utterances of 1 to 35 s, 8 s on average, as in audiobooks: below 5 % is padding, and below a
    tenth of what batches in corpus order would pad."""
    rng = np.random.default_rng(0)
    seconds_N = np.clip(rng.lognormal(mean=1.9, sigma=0.7, size=900), 1.0, 35.0)
    assert 7200 < seconds_N.sum() < 9000
    found = padding_share(seconds_N, batch_rows(seconds_N, 120.0))
    in_order = padding_share(seconds_N, [list(range(row, min(row + 14, 900))) for row in range(0, 900, 14)])
    assert found < 0.05
    assert found < in_order / 10


def test_pad() -> None:
    features = [np.full((frames, 3), frames, dtype=np.float32) for frames in (2, 4, 1)]
    features_BTD, lengths_B = pad(features)
    assert (features_BTD.shape, features_BTD.dtype) == ((3, 4, 3), torch.float32)
    assert (lengths_B.tolist(), lengths_B.dtype) == ([2, 4, 1], torch.int64)
    for row, feature in enumerate(features):
        np.testing.assert_array_equal(features_BTD[row, : len(feature)], feature)
        assert not features_BTD[row, len(feature) :].any()
