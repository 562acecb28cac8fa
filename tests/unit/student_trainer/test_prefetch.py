"""Working ahead changes neither order nor errors, is bounded, and ends with whoever wanted it."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from student_trainer.prefetch import prefetched


@given(items=st.lists(st.integers()), depth=st.integers(1, 5))
def test_the_same_items_in_the_same_order(items: list[int], depth: int) -> None:
    assert list(prefetched(iter(items), depth=depth)) == items


@pytest.mark.parametrize("depth", [1, 3])
def test_no_more_are_made_than_asked_for(depth: int) -> None:
    made, enough = [], threading.Semaphore(0)

    def items() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            enough.release()
            yield number

    found = prefetched(items(), depth=depth)
    for wanted in range(4):
        assert next(found) == wanted
        # The one in use and those ahead; a further one would need another to be taken.
        while len(made) < wanted + 1 + depth:
            assert enough.acquire(timeout=30)
        assert len(made) == wanted + 1 + depth
    found.close()


def test_an_error_takes_its_items_place() -> None:
    def items() -> Iterator[int]:
        yield from (1, 2)
        raise OSError("the store is gone")

    found = prefetched(items(), depth=4)
    assert [next(found), next(found)] == [1, 2]
    with pytest.raises(OSError, match="the store is gone"):
        next(found)


def test_leaving_early_does_not_wait() -> None:
    started, may_end = threading.Event(), threading.Event()

    def items() -> Iterator[int]:
        yield 1
        started.set()
        assert may_end.wait(30)
        yield 2

    found = prefetched(items(), depth=1)
    assert next(found) == 1
    assert started.wait(30)
    found.close()
    # Only now may the item that was being made be finished.
    may_end.set()
