"""What is fuzzed: for each target one case, made from (seed, number), read, and judged."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from random import Random

from softlabel_schemas import InputError, IntegrityError
from tests.fuzz import document_targets, shard_targets
from tests.fuzz.dataset_target import dataset

REFUSED = (IntegrityError, InputError)
# Of a hundred cases. A whole dataset takes thirty times as long as a document.
SHARES = {
    "manifest": 15, "commit": 10, "spec": 8, "inventory": 6,
    "streams": 20, "parquet": 18, "block": 7, "zarr": 15, "dataset": 1,
}  # fmt: skip
_TARGET_OF = tuple(name for name, share in SHARES.items() for _ in range(share))


def target_of(number: int) -> str:
    # 37: so that neighbouring numbers are of different targets.
    return _TARGET_OF[number * 37 % 100]


def run_case(seed: int, number: int) -> str:
    """How the case ended: "accepted", or the name of the clean error. Anything else is raised."""
    rng = Random(f"{seed}:{number}")
    try:
        _TARGETS[target_of(number)](rng)
    except REFUSED as error:
        # An attacker's text is shown, but not all of it, and nothing that a terminal obeys.
        message = str(error)
        assert len(message) < 20_000, f"a message of {len(message)} characters"
        assert "\x1b" not in message, "a control character in a message"
        return type(error).__name__
    return "accepted"


def warm_up() -> None:
    """Import and make everything that is needed, so that a case itself does neither."""
    for number in range(300):
        # What is wrong with a reader shall be the finding of a case, not the end of the worker.
        with contextlib.suppress(Exception):
            run_case(0, number)


_TARGETS: dict[str, Callable[[Random], None]] = {
    "manifest": document_targets.manifest,
    "commit": document_targets.commit,
    "spec": document_targets.spec,
    "inventory": document_targets.inventory,
    "streams": shard_targets.streams,
    "parquet": shard_targets.parquet,
    "block": shard_targets.block,
    "zarr": shard_targets.zarr,
    "dataset": dataset,
}
