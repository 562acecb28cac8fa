"""Figure: one line of the benchmark table, each a ratio to a baseline of the same run."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """What was measured.

    Attributes:
        value, baseline: medians, in ``unit``; ``baseline`` is None where the target is absolute.
        ratio: value / baseline (for a rate: how many times as fast); None without a baseline.
        ratio_of_rounds: the ratio where both were measured in turn: the median over the rounds. Slow moments of the machine
            move it less than the ratio of the medians.
        target: as people read it, such as "ratio >= 0.95"; met: whether it holds.
        spread: smallest and largest value of the repeats, as a fraction of the median.
    """

    name: str
    unit: str
    value: float
    baseline: float | None = None
    baseline_name: str = ""
    target: str = ""
    met: bool | None = None
    spread: tuple[float, float] | None = None
    note: str = ""
    ratio_of_rounds: float | None = None

    @property
    def ratio(self) -> float | None:
        if self.ratio_of_rounds is not None:
            return self.ratio_of_rounds
        return None if self.baseline is None else self.value / self.baseline


def interleaved(functions: Sequence[Callable[[], float]], repeats: int) -> list[list[float]]:
    """What each function returns (its own seconds or rate), called in turn: noise of the machine hits all alike."""
    for function in functions:
        function()
    rounds = [[function() for function in functions] for _ in range(repeats)]
    return [list(values) for values in zip(*rounds, strict=True)]


def ratio_of_rounds(values: Sequence[float], baselines: Sequence[float]) -> float:
    """Of two of the lists that :func:`interleaved` gives."""
    return statistics.median(value / baseline for value, baseline in zip(values, baselines, strict=True))


def median_and_spread(values: Sequence[float]) -> tuple[float, tuple[float, float]]:
    median = statistics.median(values)
    return median, (min(values) / median, max(values) / median)


def to_json(figures: Sequence[Figure]) -> str:
    return json.dumps([{**asdict(figure), "ratio": figure.ratio} for figure in figures], indent=2)
