"""Which shards stand for all of them."""

from __future__ import annotations

import math


def evenly_spaced(num_shards: int, num_wanted: int) -> list[int]:
    """``num_wanted`` of them, spread over all, ascending; all where there are no more."""
    num_wanted = min(num_shards, num_wanted)
    return [(2 * place + 1) * num_shards // (2 * num_wanted) for place in range(num_wanted)]


def share_of(num_shards: int, fraction: float) -> int:
    """So many shards are ``fraction`` of all: at least one, if there is any."""
    return min(num_shards, max(1, math.ceil(fraction * num_shards)))
