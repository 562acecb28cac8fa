"""compiled: functions of numbers and arrays that Numba turns into machine code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba

Function = Callable[..., Any]


def compiled(*, fastmath: set[str] | bool = False) -> Callable[[Function], Function]:
    """Compiled at the first call; kept on disk for the next process, beside the module or in NUMBA_CACHE_DIR.

    Without the interpreter lock, so that threads run at once. Numba checks no index: the function does, where one depends on
    data that a stranger may have written.

    Args:
        fastmath: LLVM's flags; "reassoc" lets sums be vectorised. A machine with wider vectors then rounds otherwise, as
            acoustic models themselves do.
    """

    def compile_it(function: Function) -> Function:
        options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": fastmath}
        try:
            return numba.njit(cache=True, **options)(function)  # type: ignore[no-any-return]
        except RuntimeError:
            # No folder for the cache can be written: every process compiles for itself, some seconds.
            return numba.njit(**options)(function)  # type: ignore[no-any-return]

    return compile_it
