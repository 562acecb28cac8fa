"""Steps that are measured in processes of their own."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.benchmarks.fresh_process import Step, measure

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured on Linux only")


def allocating(num_bytes: int, before: int) -> Step:
    bytearray(b"1") * before
    return Step(run=lambda: len(bytearray(b"1") * num_bytes), baseline=lambda: None)


def waiting() -> Step:
    def wait() -> int:
        time.sleep(0.5)
        return 0

    return Step(run=wait, baseline=lambda: None)


def failing() -> Step:
    raise ValueError("too small")


def test_the_peak_is_that_of_the_step() -> None:
    measured = measure(allocating, num_bytes=100_000_000, before=300_000_000)
    assert measured.count == 100_000_000
    assert 80 < measured.peak_mb - measured.idle_mb < 150
    assert measured.peak_mb < 250


def test_waiting_takes_little_processor_time() -> None:
    measured = measure(waiting)
    assert 0 <= measured.processor_seconds < measured.seconds


def test_a_step_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"failing ended with 1: (?s:.)*ValueError: too small"):
        measure(failing)
