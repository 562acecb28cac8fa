"""An iterator, worked ahead of by a thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")


def prefetched(items: Iterator[T], *, depth: int) -> Generator[T, None, None]:
    """The same items in the same order, ``depth`` of them ahead of the one in use. An error takes its item's place.

    Left early, as by Ctrl-C, it does not wait for the item that is being made: that may take as long as a store does.
    """
    worker = ThreadPoolExecutor(max_workers=1)

    def take() -> list[T]:
        return list(islice(items, 1))

    try:
        coming: deque[Future[list[T]]] = deque(worker.submit(take) for _ in range(depth))
        while True:
            coming.append(worker.submit(take))
            taken = coming.popleft().result()
            if not taken:
                return
            yield taken.pop()
    finally:
        worker.shutdown(wait=False, cancel_futures=True)
