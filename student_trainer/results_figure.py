"""The figure of a sweep: each arm's frame error, mean and spread over seeds. The same records give the same bytes."""

from __future__ import annotations

import io
import re

import matplotlib
from matplotlib.figure import Figure

from student_trainer.results_arms import arms_of
from student_trainer.sweep_records import SweepRecords

_COLOURS = {"hard": "#b3470b", "soft": "#8a2f86", "hard+soft": "#0b5cad"}
_ENSEMBLE_COLOUR = "#1c1c1c"
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
}
_WIDTH_INCHES, _ARM_INCHES, _MARGIN_INCHES = 7.0, 0.28, 1.0


def error_figure(sweep: SweepRecords, *, salt: str) -> str:
    """SVG text. ``salt``: makes its ids, so that figures of one page have ids of their own."""
    students = [arm for arm in arms_of(sweep) if not arm.is_ensemble]
    with matplotlib.rc_context():
        # A matplotlibrc of the reader's must not change the figure.
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({**_STYLE, "svg.hashsalt": salt})
        figure = Figure(
            figsize=(_WIDTH_INCHES, _MARGIN_INCHES + _ARM_INCHES * len(students)),
            layout="constrained",
            facecolor="white",
        )
        axes = figure.add_subplot()
        for row, arm in enumerate(students):
            mean, std = arm.spread("frame_error_rate")
            colour = _COLOURS[arm.first.labels or "hard"]
            axes.errorbar(mean, row, xerr=std, fmt="o", markersize=5, capsize=3, color=colour)
            axes.plot(arm.values["frame_error_rate"], [row] * arm.num_seeds, "|", color=colour, alpha=0.6)
        for arm in arms_of(sweep):
            if arm.is_ensemble:
                mean, _ = arm.spread("frame_error_rate")
                axes.axvline(mean, color=_ENSEMBLE_COLOUR, linestyle="--", linewidth=1.2, label=arm.name)
        axes.set_yticks(range(len(students)), [arm.name for arm in students])
        axes.set_ylim(len(students) - 0.4, -0.6)
        if axes.get_legend_handles_labels()[0]:
            figure.legend(loc="outside upper right", frameon=False)
        axes.set_xlabel("frame error, percent (mean ± standard deviation)")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    # What is left of the metadata names matplotlib's version.
    return re.sub(r"<metadata>.*?</metadata>\s*", "", buffer.getvalue(), flags=re.DOTALL)
