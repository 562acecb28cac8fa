"""read_ahead: a function of one item after the other, called by threads a few items before its results are needed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


def read_ahead(
    read: Callable[[ItemT], ResultT], items: Iterable[ItemT], *, num_parallel: int
) -> Generator[Future[ResultT], None, None]:
    """A future for each item, in order; its ``result()`` waits, and raises what ``read`` raised.

    At most ``num_parallel`` results are made or waiting beside the one that was yielded last. Closing the iterator drops
    what is not begun, waits for what is, and ends the threads.
    """
    remaining = iter(items)
    with ThreadPoolExecutor(max_workers=num_parallel, thread_name_prefix="read-ahead") as pool:
        waiting: deque[Future[ResultT]] = deque()
        try:
            while True:
                # Before the oldest is handed out: the threads go on while the caller waits for it or works with it.
                waiting.extend(pool.submit(read, item) for item in islice(remaining, num_parallel + 1 - len(waiting)))
                if not waiting:
                    return
                yield waiting.popleft()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
