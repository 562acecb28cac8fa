"""Threads ahead and behind: order, bounds, errors, and that none outlives its work."""

from __future__ import annotations

import threading
import time

import pytest

from teacher_service.overlap import Behind, ahead


def num_threads() -> int:
    return sum(thread.name.startswith(("ahead", "behind")) for thread in threading.enumerate())


def test_ahead_keeps_the_order_and_the_depth() -> None:
    made: list[int] = []

    def make(item: int) -> int:
        made.append(item)
        return item * item

    results = []
    with ahead(make, range(20), depth=2) as squares:
        for position, square in enumerate(squares):
            assert len(made) <= position + 3
            results.append(square)
    assert results == [item * item for item in range(20)]
    assert num_threads() == 0


def test_ahead_really_is() -> None:
    """The second item is made while the first is in use."""
    second = threading.Event()

    def make(item: int) -> int:
        if item == 1:
            second.set()
        return item

    with ahead(make, range(2), depth=2) as items:
        assert next(items) == 0
        assert second.wait(10)


def test_several_threads_ahead_keep_the_order() -> None:
    """The first is held up until another has been made."""
    another = threading.Event()

    def make(item: int) -> int:
        if item == 0:
            assert another.wait(10)
        else:
            another.set()
        return item

    with ahead(make, range(50), depth=4, num_threads=3) as items:
        assert list(items) == list(range(50))
    assert num_threads() == 0


def test_an_error_ahead_comes_in_its_turn() -> None:
    def make(item: int) -> int:
        if item == 2:
            raise OSError("disk")
        return item

    found = []
    with pytest.raises(OSError, match="disk"), ahead(make, range(9), depth=3) as items:
        found.extend(items)
    # ``extend`` keeps what came before the error.
    assert found == [0, 1]
    assert num_threads() == 0


def test_what_is_ahead_of_an_error_of_the_consumer_is_not_made() -> None:
    made: list[int] = []

    def make(item: int) -> int:
        made.append(item)
        time.sleep(0.01)
        return item

    def consume() -> None:
        with ahead(make, range(1000), depth=2) as items:
            next(items)
            raise RuntimeError("model")

    with pytest.raises(RuntimeError, match="model"):
        consume()
    assert len(made) <= 4
    assert num_threads() == 0


def test_behind_returns_the_result_before() -> None:
    with Behind[int]() as behind:
        assert [behind.push(pow, item, 2) for item in range(4)] == [None, 0, 1, 4]
        assert behind.last() == 9
        assert behind.last() is None
    assert num_threads() == 0


def test_behind_runs_beside_the_caller_and_one_at_a_time() -> None:
    go = threading.Event()
    with Behind[bool]() as behind:
        behind.push(go.wait, 10)
        go.set()
        assert behind.push(bool, 1) is True


def test_an_error_behind_is_raised_by_the_next_push() -> None:
    with Behind[object]() as behind:
        behind.push(divmod, 1, 0)
        with pytest.raises(ZeroDivisionError):
            behind.push(abs, 1)
    assert num_threads() == 0
