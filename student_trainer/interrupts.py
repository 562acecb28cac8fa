"""Ctrl-C and SIGTERM, held back while what is in memory must not be left half changed."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """One that comes within the block takes effect at its end. Signals reach the main thread alone; elsewhere, and where they
    are ignored or end a process at once, nothing is changed."""
    with _held(signal.SIGTERM), _held(signal.SIGINT):
        yield


@contextlib.contextmanager
def _held(number: signal.Signals) -> Iterator[None]:
    before = signal.getsignal(number)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    held: list[tuple[int, FrameType | None]] = []
    signal.signal(number, lambda number, frame: held.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(number, before)
    if held:
        before(*held[0])
