"""The figures of a sweep, as SVG text: frame (of CTC, token) error of each arm, and against the bytes of its labels. The same
records give the same bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from matplotlib.ticker import NullLocator, StrMethodFormatter

from softlabel_schemas import chart
from student_trainer.metric_names import Metric, error_name
from student_trainer.results_arms import ArmRecords, arms_of
from student_trainer.sweep_records import SweepRecords

_COLOURS = {"hard": chart.COLOURS[1], "soft": chart.COLOURS[3], "hard+soft": chart.COLOURS[0]}
_WIDTH_INCHES, _ARM_INCHES, _MARGIN_INCHES = 7.0, 0.28, 1.0
_BYTES_SIZE_INCHES = (8.0, 4.2)
# Fewer sizes make a table, not a curve.
_MIN_SIZES = 4
# As many as colours less one: arms of the same colour have another marker.
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def error_figure(sweep: SweepRecords, *, salt: str) -> str:
    """Error of each arm, mean and spread over seeds. ``salt``: see ``chart.svg``."""
    metric = sweep.leading
    students = [arm for arm in arms_of(sweep) if not arm.is_ensemble]

    def draw(axes: Any) -> None:
        for row, arm in enumerate(students):
            spread, colour = arm.spread(metric), _colour(arm)
            axes.errorbar(spread.mean, row, xerr=spread.std, fmt="o", capsize=3, color=colour)
            axes.plot(list(arm.values[metric].values()), [row] * arm.num_seeds, "|", color=colour, alpha=0.6)
        for arm in arms_of(sweep):
            if arm.is_ensemble:
                axes.axvline(arm.spread(metric).mean, color=_colour(arm), linestyle="--", linewidth=1.2, label=arm.name)
        axes.set_yticks(range(len(students)), [arm.name for arm in students])
        axes.set_ylim(len(students) - 0.4, -0.6)
        if axes.get_legend_handles_labels()[0]:
            axes.figure.legend(loc="outside upper right", frameon=False)
        axes.set_xlabel(_label(metric))

    height = _MARGIN_INCHES + _ARM_INCHES * len(students)
    return chart.svg(draw, size_inches=(_WIDTH_INCHES, height), salt=salt, background="white")


def bytes_figure(sweep: SweepRecords, *, salt: str) -> str | None:
    """Error against bytes per frame, with lines for what takes none; None of a sweep with few different sizes."""
    points = list(_points(sweep))
    if len({size for _, size in points}) < _MIN_SIZES:
        return None
    metric = sweep.leading
    hard_only = [arm for arm in arms_of(sweep) if arm.first.labels == "hard"]
    ensembles = [arm for arm in arms_of(sweep) if arm.is_ensemble]

    def draw(axes: Any) -> None:
        for index, (arm, size) in enumerate(points):
            spread = arm.spread(metric)
            colour, marker = chart.COLOURS[index % len(chart.COLOURS)], _MARKERS[index % len(_MARKERS)]
            axes.errorbar(size, spread.mean, yerr=spread.std, fmt=marker, capsize=3, color=colour, label=arm.name)
        for arm in hard_only:
            axes.axhline(arm.spread(metric).mean, color=_colour(arm), linewidth=1.2, label=arm.name)
        low, high = axes.get_ylim()
        for arm in ensembles:
            mean = arm.spread(metric).mean
            # A line far off would leave no room for what the arms differ in.
            is_far = not 2 * low - high < mean < 2 * high - low
            style = {"color": _colour(arm), "linestyle": "--", "linewidth": 1.2}
            if is_far:
                axes.plot([], [], label=f"{arm.name}, out of sight: {mean:.2f}", **style)
            else:
                axes.axhline(mean, label=arm.name, **style)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(xlabel="bytes per frame of the arm's labels", ylabel=_label(metric))
        axes.figure.legend(loc="outside right upper", frameon=False, fontsize=8)

    return chart.svg(draw, size_inches=_BYTES_SIZE_INCHES, salt=salt, background="white")


def _label(metric: Metric) -> str:
    return f"{error_name(metric)}, percent (mean ± standard deviation)"


def _points(sweep: SweepRecords) -> Iterator[tuple[ArmRecords, float]]:
    for arm in arms_of(sweep):
        size = arm.first.labels_bytes_per_frame
        if size is not None and not arm.is_ensemble:
            yield arm, size


def _colour(arm: ArmRecords) -> str:
    return chart.ENSEMBLE_COLOUR if arm.first.labels is None else _COLOURS[arm.first.labels]
