"""The metrics of an evaluation, each named once: what it counts, and how it is shown.

Evaluations against hard labels of frames have frame errors, phone errors, cross-entropy and calibration error; those of CTC
have token errors; both may have word errors. Comparisons, records and pages ask which of these there are, and nothing else.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, get_args

Metric = Literal[
    "frame_error_rate", "token_error_rate", "phone_error_rate", "word_error_rate", "cross_entropy", "calibration_error"
]
# In the order in which they are shown.
METRICS: tuple[Metric, ...] = get_args(Metric)
# Of the rates that are errors among units: the fields of an utterance that count both.
COUNTS: dict[Metric, tuple[str, str]] = {
    "frame_error_rate": ("frame_errors", "frames"),
    "token_error_rate": ("token_errors", "tokens"),
    "phone_error_rate": ("phone_errors", "phones"),
    "word_error_rate": ("word_errors", "words"),
}
COLUMNS: dict[Metric, str] = {
    "frame_error_rate": "frame error %",
    "token_error_rate": "token error %",
    "phone_error_rate": "phone error %",
    "word_error_rate": "word error %",
    "cross_entropy": "cross-entropy",
    "calibration_error": "calibration error %",
}
# Of cross-entropy, in nats; rates are in percent.
DIGITS: dict[Metric, int] = {"cross_entropy": 3}
NATS: tuple[Metric, ...] = ("cross_entropy",)


def leading(metrics: Collection[str]) -> Metric:
    """The one that every evaluation of a kind has: token error rate of CTC, frame error rate else."""
    return "token_error_rate" if "token_error_rate" in metrics else "frame_error_rate"


def unit_name(metric: Metric) -> str:
    """What errors are counted among: ``frame``, ``token``, ``phone`` or ``word``."""
    return metric.removesuffix("_error_rate")


def error_name(metric: Metric) -> str:
    """``frame error``, as it is said in a sentence."""
    return f"{unit_name(metric)} error"
