"""Of the values of an arm's seeds: their mean and deviation, and how these are written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from student_trainer.metric_names import DIGITS, Metric


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """``std`` is the sample standard deviation (ddof = 1), None for a single value."""

    mean: float
    std: float | None


def spread_of(values: Sequence[float]) -> Spread:
    """Of one value or more."""
    return Spread(mean=float(np.mean(values)), std=float(np.std(values, ddof=1)) if len(values) > 1 else None)


def format_spread(spread: Spread, metric: Metric) -> str:
    """``34.10 ± 0.25``, or ``34.10`` for a single value."""
    digits = DIGITS.get(metric, 2)
    mean = f"{spread.mean:.{digits}f}"
    return mean if spread.std is None else f"{mean} ± {spread.std:.{digits}f}"
