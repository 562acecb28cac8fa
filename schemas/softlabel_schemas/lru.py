"""LruCache: values in memory by key, bounded in bytes, for any number of threads."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Generic, TypeVar

KeyT = TypeVar("KeyT")
ValueT = TypeVar("ValueT")


class LruCache(Generic[KeyT, ValueT]):
    """At most ``max_bytes``, the least recently used dropped first; the latest is kept whatever its size."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._num_bytes = 0
        self._items: OrderedDict[KeyT, tuple[ValueT, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: KeyT) -> ValueT | None:
        with self._lock:
            if key not in self._items:
                return None
            self._items.move_to_end(key)
            return self._items[key][0]

    def put(self, key: KeyT, value: ValueT, num_bytes: int) -> None:
        with self._lock:
            _, replaced = self._items.pop(key, (None, 0))
            self._items[key] = (value, num_bytes)
            self._num_bytes += num_bytes - replaced
            while self._num_bytes > self.max_bytes and len(self._items) > 1:
                _, (_, dropped) = self._items.popitem(last=False)
                self._num_bytes -= dropped

    def items(self) -> list[tuple[KeyT, ValueT]]:
        """The latest first; none of them counts as used."""
        with self._lock:
            return [(key, value) for key, (value, _) in reversed(self._items.items())]
