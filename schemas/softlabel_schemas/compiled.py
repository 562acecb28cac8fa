"""compiled: functions of numbers and arrays that Numba turns into machine code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled at the first call; kept on disk for the next process, where a folder for that can be written.

    Without the interpreter lock, so that threads run at once. Numba checks no index: the function does, where one depends on
    data that a stranger may have written.
    """
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        kernel: Callable[..., Any] = numba.njit(cache=True, **options)(function)
    except RuntimeError:
        kernel = numba.njit(**options)(function)
    return kernel
