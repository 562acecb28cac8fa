"""report.html: one self-contained page of a comparison, deterministic, without scripts and without requests.

Figures are inline SVG by matplotlib. Their text is left as text and their legends are HTML, so that both stay readable on a
narrow screen, and a reader's own fonts are used. The page is ``templates/report.html.jinja``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.transforms import ScaledTranslation

from softlabel_schemas.chart import COLOURS, ENSEMBLE_COLOUR, inline_svg
from softlabel_schemas.html import page_templates
from softlabel_schemas.object_store import ObjectStore
from student_trainer.arms import Arm
from student_trainer.compare import (
    NO_PAIRS,
    UNKNOWN,
    Comparison,
    LabelledData,
    format_p,
    signed,
    table_columns,
    table_rows,
    verdict,
    warnings,
)
from student_trainer.metric_names import error_name

# matplotlib's marker -> the same shape as an SVG path in a 12 x 12 box; the shapes tell arms apart without colour.
_MARKERS = {
    "o": "M6 2a4 4 0 1 0 .01 0z",
    "s": "M2.5 2.5h7v7h-7z",
    "^": "M6 1.5 10.5 10h-9z",
    "D": "M6 1 11 6 6 11 1 6z",
    "v": "M6 10.5 1.5 2h9z",
    "P": "M4.3 1.5h3.4v2.8h2.8v3.4H7.7v2.8H4.3V7.7H1.5V4.3h2.8z",
}
_NUM_BINS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """How an arm or a dataset looks in every figure and legend."""

    label: str
    colour: str
    marker: str = ""
    dashed: bool = False

    @property
    def path(self) -> str:
        return _MARKERS.get(self.marker, "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """``svg`` is None where there is nothing to draw; ``caption`` then says why."""

    title: str
    svg: Markup | None
    marks: Sequence[Mark]
    caption: str


def render(comparison: Comparison) -> str:
    """The page."""
    templates = page_templates("student_trainer")
    marks = {arm.name: _mark(arm, index) for index, arm in enumerate(comparison.arms)}
    setups = [(arm.name, _setup(arm)) for arm in comparison.arms if arm.runs]
    first = comparison.evaluation
    return templates.get_template("report.html.jinja").render(
        splits=", ".join(first.splits),
        num_utterances=len(first.utterances),
        num_counted=first.num_counted,
        metrics=comparison.metrics,
        corpus_digest=first.corpus_digest,
        columns=table_columns(comparison),
        rows=list(zip(comparison.arms, table_rows(comparison), strict=True)),
        pairs=comparison.pairs,
        no_pairs=NO_PAIRS,
        verdict=verdict,
        signed=signed,
        format_p=format_p,
        warnings=warnings(comparison),
        setup_columns=list(setups[0][1]) if setups else [],
        setups=setups,
        datasets=comparison.datasets,
        selection=_selection,
        unknown=UNKNOWN,
        plots=[
            _learning_curves(comparison, marks),
            _error_against_bytes(comparison, marks),
            _histogram(comparison, "kept-mass", "Kept mass", "probability kept (mean of an utterance)", "kept_mass_N"),
            _histogram(comparison, "entropy", "Entropy", "entropy, nats (mean of an utterance)", "entropy_N"),
        ],
    )


def write(path: str, text: str) -> None:
    """Write a file and rename it into place, so that a kill leaves the old or the new one."""
    ObjectStore(Path(path).parent).put(Path(path).name, text.encode())


def _mark(arm: Arm, index: int) -> Mark:
    marker = tuple(_MARKERS)[index % len(_MARKERS)]
    if arm.kind == "ensemble":
        return Mark(label=arm.name, colour=ENSEMBLE_COLOUR, marker=marker, dashed=True)
    return Mark(label=arm.name, colour=COLOURS[index % len(COLOURS)], marker=marker)


def _setup(arm: Arm) -> dict[str, str]:
    """What a reader needs to see that budgets are equal."""
    run, config = arm.runs[0], arm.runs[0].config
    arguments, soft = _words(config.model.arguments), config.soft_labels
    shown = {
        "model": config.model.architecture + (f" ({arguments})" if arguments else ""),
        "seeds": ", ".join(map(str, arm.seeds)),
        "parameters": f"{run.num_parameters:,}",
        "epochs": str(config.training.epochs),
        "batch,\u00a0s": f"{config.training.batch_seconds:g}",
        "learning rate": f"{config.training.learning_rate:g}",
    }
    if soft is None:
        return shown | dict.fromkeys(("soft loss", "selection", "dataset"), UNKNOWN)
    loss = {"weight": soft.weight, "temperature": soft.temperature, "tail": soft.tail, "heads": soft.num_heads}
    return shown | {
        "soft loss": _words(loss),
        "selection": _selection(soft.selection.model_dump()) if soft.selection else "as stored",
        "dataset": ", ".join(digest[:12] for digest in run.dataset_digests) or UNKNOWN,
    }


def _selection(selection: dict[str, Any]) -> str:
    """In words: ``mass 0.95, max entries 20, keep hard label``, ``top 20``."""
    kept = {name: value for name, value in selection.items() if name != "policy" and value is not False}
    return _words({"top" if name == "k" else name.replace("_", " "): value for name, value in kept.items()})


def _words(settings: Mapping[str, Any]) -> str:
    """Names with their values, never broken between the two; a flag is its name alone."""
    shown = {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in settings.items()}
    words = [name if settings[name] is True else f"{name} {value}" for name, value in shown.items()]
    return ", ".join(word.replace(" ", "\u00a0") for word in words)


def _learning_curves(comparison: Comparison, marks: dict[str, Mark]) -> Plot:
    title, measured = "Learning curves", error_name(comparison.evaluation.leading)
    curves: list[tuple[Mark, list[int], np.ndarray]] = []
    for arm in comparison.arms:
        epochs = [epoch.epoch for epoch in arm.runs[0].history] if arm.runs else []
        errors = [[epoch.dev.error for epoch in run.history if epoch.dev] for run in arm.runs]
        if epochs and all(len(seed) == len(epochs) for seed in errors):
            curves.append((marks[arm.name], epochs, np.array(errors)))
    if not curves:
        return Plot(title=title, svg=None, marks=[], caption="No run was evaluated on dev splits while it trained.")

    def draw(axes: Any) -> None:
        for mark, epochs, errors_SE in curves:
            axes.fill_between(epochs, errors_SE.min(axis=0), errors_SE.max(axis=0), color=mark.colour, alpha=0.15, lw=0)
            axes.plot(epochs, errors_SE.mean(axis=0), color=mark.colour, marker=mark.marker, markersize=4)
        axes.set(xlabel="epoch", ylabel=f"dev {measured}, %")
        axes.xaxis.get_major_locator().set_params(integer=True)

    last = [f"{mark.label} {errors.mean(axis=0)[0]:.1f} to {errors.mean(axis=0)[-1]:.1f}" for mark, _, errors in curves]
    return Plot(
        title=title,
        svg=inline_svg("curves", title, f"Dev {measured} in percent, first to last epoch: {'; '.join(last)}.", draw),
        marks=[mark for mark, _, _ in curves],
        caption=f"{measured.capitalize()} on the dev splits after each epoch: mean over seeds; the band spans all seeds.",
    )


def _error_against_bytes(comparison: Comparison, marks: dict[str, Mark]) -> Plot:
    title, measured = "Error against storage", error_name(comparison.evaluation.leading)
    points = [(arm, size) for arm in comparison.arms if (size := comparison.bytes_per_frame(arm)) is not None]
    missing = [arm.name for arm in comparison.arms if arm.is_soft and comparison.bytes_per_frame(arm) is None]
    hint = f"Not shown, for want of their dataset (give it with --dataset): {', '.join(missing)}." if missing else ""
    if not points:
        return Plot(title=title, svg=None, marks=[], caption=hint or "No arm was trained with soft labels.")
    lines = [arm for arm in comparison.arms if arm.is_hard_only or arm.kind == "ensemble"]
    limit = 1.2 * max(bytes_per_frame for _, bytes_per_frame in points)

    def draw(axes: Any) -> None:
        for arm in lines:
            mark, found = marks[arm.name], arm.error
            style = (0, (5, 3)) if mark.dashed else "solid"
            axes.plot(
                [0, limit],
                [found.mean] * 2,
                color=mark.colour,
                linestyle=style,
                marker=mark.marker,
                markevery=[1],
                clip_on=False,
            )
        for index, (arm, bytes_per_frame) in enumerate(points):
            mark, found = marks[arm.name], arm.error
            peers = [other for other, (_, size) in enumerate(points) if size == bytes_per_frame]
            # 8 points of type apart.
            right = 8 / 72 * (peers.index(index) - (len(peers) - 1) / 2)
            shift = ScaledTranslation(right, 0, axes.figure.dpi_scale_trans)
            axes.errorbar(
                bytes_per_frame, found.mean, yerr=found.std or None, color=mark.colour, marker=mark.marker,
                markersize=6, capsize=4, linestyle="none", transform=axes.transData + shift,
            )  # fmt: skip
        axes.set(xlabel="bytes per frame", ylabel=f"{measured}, %", xlim=(0, limit))

    shown = [f"{arm.name} {arm.error.mean:.2f} percent at {size:.1f} bytes per frame" for arm, size in points]
    shown += [f"{arm.name} {arm.error.mean:.2f} percent without stored labels" for arm in lines]
    return Plot(
        title=title,
        svg=inline_svg("bytes", title, f"{measured.capitalize()}: {'; '.join(shown)}.", draw),
        marks=[
            marks[arm.name] for arm in comparison.arms if arm in lines or comparison.bytes_per_frame(arm) is not None
        ],
        caption="Points: arms with soft labels, at the size of their dataset (± standard deviation over seeds). "
        "Those of one dataset stand side by side. Solid lines: hard labels only. Dashed: the teacher ensemble. " + hint,
    )


def _histogram(comparison: Comparison, name: str, title: str, label: str, attribute: str) -> Plot:
    if not comparison.datasets:
        return Plot(title=title, svg=None, marks=[], caption="No dataset was given (--dataset).")
    values = [getattr(data, attribute).astype(np.float64) for data in comparison.datasets]
    ends = min(map(np.min, values)), max(map(np.max, values))
    edges = np.linspace(*(ends if ends[0] < ends[1] else (ends[0] - 0.005, ends[1] + 0.005)), _NUM_BINS + 1)
    marks = [Mark(label=data.url, colour=COLOURS[i % len(COLOURS)]) for i, data in enumerate(comparison.datasets)]

    def draw(axes: Any) -> None:
        for mark, data, values_N in zip(marks, comparison.datasets, values, strict=True):
            shares = np.histogram(values_N, edges, weights=100 * data.frames_N / data.frames_N.sum())[0]
            axes.stairs(shares, edges, fill=True, color=mark.colour, alpha=0.18)
            axes.stairs(shares, edges, color=mark.colour, lw=1.6)
        axes.set(xlabel=label, ylabel="share of frames, %")

    means = [f"{data.url} {_weighted(data, attribute):.3f}" for data in comparison.datasets]
    return Plot(
        title=f"{title} of the stored labels",
        svg=inline_svg(name, title, f"Mean over frames: {'; '.join(means)}.", draw),
        marks=marks,
        caption=f"Mean over all frames: {'; '.join(means)}.",
    )


def _weighted(data: LabelledData, attribute: str) -> float:
    return float(np.average(getattr(data, attribute).astype(np.float64), weights=data.frames_N))
