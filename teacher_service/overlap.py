"""Overlap: work that runs in a thread ahead of the model, and work that trails behind it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from types import TracebackType
from typing import Generic, ParamSpec, Self, TypeVar

P = ParamSpec("P")
Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def ahead(
    function: Callable[[Item], Result], items: Iterable[Item], *, depth: int, num_threads: int = 1
) -> Iterator[Iterator[Result]]:
    """``function`` of each item, in order; made in threads from the start of the block, up to ``depth`` items ahead.

    An error of ``function`` is raised where its result would have come. Leaving the block waits for the items in work and
    ends the threads.
    """
    remaining = iter(items)
    with ThreadPoolExecutor(num_threads, thread_name_prefix="ahead") as pool:
        pending = deque(pool.submit(function, item) for item in islice(remaining, depth))

        def results() -> Iterator[Result]:
            while pending:
                result = pending.popleft().result()
                pending.extend(pool.submit(function, item) for item in islice(remaining, 1))
                yield result

        try:
            yield results()
        finally:
            pool.shutdown(cancel_futures=True)


class Behind(Generic[Result]):
    """One call at a time in a thread behind the caller; each :meth:`push` hands over the result of the call before.

    Leaving the block waits for the call in work and ends the thread.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="behind")
        self._pending: Future[Result] | None = None

    def push(self, function: Callable[P, Result], *args: P.args, **kwargs: P.kwargs) -> Result | None:
        """Raises what the call before raised."""
        before = self.last()
        self._pending = self._pool.submit(function, *args, **kwargs)
        return before

    def last(self) -> Result | None:
        """The result of the call that is still out; None where there is none."""
        pending, self._pending = self._pending, None
        return None if pending is None else pending.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
