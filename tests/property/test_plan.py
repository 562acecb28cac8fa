"""The cut of a corpus into shards."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from softlabel_schemas.plan import ShardPlanner, ShardRange, plan_shards

# Sixteenths of a second add up without rounding, so that the rule can be checked exactly.
exact_seconds = st.lists(st.integers(1, 20 * 16).map(lambda sixteenths: sixteenths / 16), min_size=1, max_size=60)
# Also durations that are lost in the running total, or swallow it.
any_seconds = st.lists(st.one_of(st.floats(1e-4, 1e5), st.floats(1e-12, 1e12)), min_size=1, max_size=60)


@given(st.one_of(exact_seconds, any_seconds), st.floats(0.1, 1e4))
def test_shards_cover_all_rows_in_order(seconds: list[float], shard_seconds: float) -> None:
    ranges = plan_shards(np.array(seconds), shard_seconds)
    assert [shard.index for shard in ranges] == list(range(len(ranges)))
    rows = [row for shard in ranges for row in range(shard.first_row, shard.first_row + shard.num_rows)]
    assert rows == list(range(len(seconds)))
    assert all(shard.num_rows > 0 for shard in ranges)


@given(exact_seconds, st.integers(1, 60))
def test_an_utterance_belongs_to_the_shard_in_which_it_starts(seconds: list[float], shard_seconds: int) -> None:
    slots = []
    for shard in plan_shards(np.array(seconds), shard_seconds):
        starts = [sum(seconds[:row]) for row in range(shard.first_row, shard.first_row + shard.num_rows)]
        own_slots = {start // shard_seconds for start in starts}
        assert len(own_slots) == 1
        slots += own_slots
    assert slots == sorted(set(slots))


def test_a_small_example() -> None:
    # Starts: 0, 4, 8, 12, 37, 38. An utterance longer than a shard leaves no empty shards behind it.
    assert plan_shards(np.array([4.0, 4, 4, 25, 1, 1]), 10.0) == [
        ShardRange(index=0, first_row=0, num_rows=3),
        ShardRange(index=1, first_row=3, num_rows=1),
        ShardRange(index=2, first_row=4, num_rows=2),
    ]


def cut_at_once(seconds_N: npt.NDArray[np.float64], shard_seconds: float) -> list[tuple[int, int]]:
    """First rows and numbers of rows, by the rule in its first form; datasets that were begun with it must resume."""
    starts_N = np.cumsum(seconds_N, dtype=np.float64) - seconds_N
    shard_of_N = np.floor(starts_N / shard_seconds).astype(np.int64)
    first_rows = np.flatnonzero(np.diff(shard_of_N, prepend=-1))
    ends = np.append(first_rows[1:], len(shard_of_N))
    return [(int(first), int(end - first)) for first, end in zip(first_rows, ends, strict=True)]


@given(any_seconds, st.floats(0.01, 1e4), st.lists(st.integers(0, 60), max_size=8))
def test_the_cut_does_not_depend_on_how_rows_are_handed_over(
    seconds: list[float], shard_seconds: float, cuts: list[int]
) -> None:
    seconds_N = np.array(seconds)
    planner = ShardPlanner(shard_seconds)
    for piece in np.split(seconds_N, sorted(min(cut, len(seconds)) for cut in cuts)):
        planner.add(piece)
    plan = planner.plan()
    assert [(shard.first_row, shard.num_rows) for shard in plan] == cut_at_once(seconds_N, shard_seconds)
    assert plan == plan_shards(seconds_N, shard_seconds)
    own = [seconds_N[shard.first_row : shard.first_row + shard.num_rows].sum() for shard in plan]
    assert planner.seconds_of_shard() == pytest.approx(own)


def test_half_a_million_rows_in_uneven_pieces() -> None:
    """Where a total carried in any other way would have drifted."""
    rng = np.random.default_rng(0)
    seconds_N = rng.integers(1_000, 500_000, 500_000) / 16_000
    planner = ShardPlanner(300.0)
    for piece in np.split(seconds_N, np.sort(rng.integers(0, len(seconds_N), 200))):
        planner.add(piece)
    assert [(shard.first_row, shard.num_rows) for shard in planner.plan()] == cut_at_once(seconds_N, 300.0)
