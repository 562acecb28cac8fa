"""The figures of a sweep, as SVG text: frame error of each arm, and against the bytes of its labels. The same records give the
same bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from matplotlib.ticker import NullLocator, StrMethodFormatter

from student_trainer import chart
from student_trainer.results_arms import ArmRecords, arms_of
from student_trainer.sweep_records import SweepRecords

_COLOURS = {"hard": chart.COLOURS[1], "soft": chart.COLOURS[3], "hard+soft": chart.COLOURS[0]}
_WIDTH_INCHES, _ARM_INCHES, _MARGIN_INCHES = 7.0, 0.28, 1.0
_BYTES_HEIGHT_INCHES = 4.0
# Fewer sizes make a table, not a curve.
_MIN_SIZES = 4
# Room on the left for the names of lines, in powers of the axis' range.
_LINE_NAMES = 0.25


def error_figure(sweep: SweepRecords, *, salt: str) -> str:
    """Frame error of each arm, mean and spread over seeds. ``salt``: see ``chart.svg``."""
    students = [arm for arm in arms_of(sweep) if not arm.is_ensemble]

    def draw(axes: Any) -> None:
        for row, arm in enumerate(students):
            mean, std = arm.spread("frame_error_rate")
            colour = _colour(arm)
            axes.errorbar(mean, row, xerr=std, fmt="o", capsize=3, color=colour)
            axes.plot(arm.values["frame_error_rate"], [row] * arm.num_seeds, "|", color=colour, alpha=0.6)
        for arm in arms_of(sweep):
            if arm.is_ensemble:
                mean, _ = arm.spread("frame_error_rate")
                axes.axvline(mean, color=_colour(arm), linestyle="--", linewidth=1.2, label=arm.name)
        axes.set_yticks(range(len(students)), [arm.name for arm in students])
        axes.set_ylim(len(students) - 0.4, -0.6)
        if axes.get_legend_handles_labels()[0]:
            axes.figure.legend(loc="outside upper right", frameon=False)
        axes.set_xlabel("frame error, percent (mean ± standard deviation)")

    height = _MARGIN_INCHES + _ARM_INCHES * len(students)
    return chart.svg(draw, size_inches=(_WIDTH_INCHES, height), salt=salt, background="white")


def bytes_figure(sweep: SweepRecords, *, salt: str) -> str | None:
    """Frame error against bytes per frame, with lines for what takes none; None of a sweep with few different sizes."""
    points = list(_points(sweep))
    if len({size for _, size in points}) < _MIN_SIZES:
        return None
    lines = [arm for arm in arms_of(sweep) if arm.is_ensemble or arm.first.labels == "hard"]

    def draw(axes: Any) -> None:
        for arm, size in points:
            mean, std = arm.spread("frame_error_rate")
            axes.errorbar(size, mean, yerr=std, fmt="o", capsize=3, color=_colour(arm))
            axes.annotate(arm.name, (size, mean), xytext=(4, 4), textcoords="offset points", fontsize=8)
        axes.set_xscale("log", base=2)
        low, high = axes.get_xlim()
        axes.set_xlim(low * (low / high) ** _LINE_NAMES, high)
        for arm in lines:
            mean, _ = arm.spread("frame_error_rate")
            axes.axhline(mean, color=_colour(arm), linestyle="--" if arm.is_ensemble else "-", linewidth=1.2)
            axes.annotate(
                arm.name, (0, mean), xycoords=("axes fraction", "data"), xytext=(4, 3), textcoords="offset points",
                fontsize=8, color=_colour(arm),
            )  # fmt: skip
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(
            xlabel="bytes per frame of the arm's labels", ylabel="frame error, percent (mean ± standard deviation)"
        )

    return chart.svg(draw, size_inches=(_WIDTH_INCHES, _BYTES_HEIGHT_INCHES), salt=salt, background="white")


def _points(sweep: SweepRecords) -> Iterator[tuple[ArmRecords, float]]:
    for arm in arms_of(sweep):
        size = arm.first.labels_bytes_per_frame
        if size is not None and not arm.is_ensemble:
            yield arm, size


def _colour(arm: ArmRecords) -> str:
    return chart.ENSEMBLE_COLOUR if arm.first.labels is None else _COLOURS[arm.first.labels]
