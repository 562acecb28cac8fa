"""A step in a process of its own: seconds, and the largest resident set while it runs.

function(**arguments) -> Step        in the child, untimed: whatever the step needs
Step.run(), then Step.baseline()     timed; the peak is that of ``run`` alone
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What is measured; ``run`` may return a count to check the outcome by. ``baseline`` does the least that ``run`` must."""

    run: Callable[[], int]
    baseline: Callable[[], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """``processor_seconds``: of the step's ``seconds``, what its threads ran, which other work on the machine hardly changes;
    ``idle_mb``: resident before the step (the imports); ``count``: what the step returned."""

    seconds: float
    processor_seconds: float
    baseline_seconds: float
    idle_mb: float
    peak_mb: float
    count: int


def measure(function: Callable[..., Step], **arguments: Any) -> Measured:
    """Run the step that ``function`` makes in a new Python. Raises RuntimeError with what it printed where that fails."""
    call = [sys.executable, "-m", __name__, f"{function.__module__}:{function.__name__}", json.dumps(arguments)]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{function.__name__} ended with {done.returncode}: {done.stderr[-2000:]}")
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def measure_here(function: Callable[..., Step], **arguments: Any) -> Measured:
    """In this process, whose memory may hold more than the step's."""
    step = function(**arguments)
    # From here on the peak counts anew (Linux).
    Path("/proc/self/clear_refs").write_text("5")
    idle_mb, started, ran_before = _peak_mb(), time.perf_counter(), time.process_time()
    count = step.run()
    seconds, processor_seconds = time.perf_counter() - started, time.process_time() - ran_before
    peak_mb, started = _peak_mb(), time.perf_counter()
    step.baseline()
    return Measured(
        seconds=seconds,
        processor_seconds=processor_seconds,
        baseline_seconds=time.perf_counter() - started,
        idle_mb=idle_mb,
        peak_mb=peak_mb,
        count=count,
    )


def _peak_mb() -> float:
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024 / 1e6


if __name__ == "__main__":
    module, _, function = sys.argv[1].partition(":")
    made = measure_here(getattr(importlib.import_module(module), function), **json.loads(sys.argv[2]))
    print(json.dumps(asdict(made)))
