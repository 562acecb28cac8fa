"""The cut of a corpus into shards."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from softlabel_schemas.plan import ShardRange, plan_shards

# Sixteenths of a second add up without rounding, so that the rule can be checked exactly.
exact_seconds = st.lists(st.integers(1, 20 * 16).map(lambda sixteenths: sixteenths / 16), min_size=1, max_size=60)
any_seconds = st.lists(st.floats(1e-4, 1e5), min_size=1, max_size=60)


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
