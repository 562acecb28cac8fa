"""How kept mass, entropy and agreement are spread over the utterances of a dataset, as figures for a page.

They are columns beside the labels, so a shard is read but not decoded; of a large dataset a few shards, spread evenly over it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from softlabel_schemas.chart import inline_svg
from softlabel_schemas.dataset import SoftLabelDataset
from softlabel_schemas.sampled_shards import evenly_spaced

# Shards of two hours: some 6,000 utterances, of which a histogram does not change any more.
_MAX_SHARDS = 8
_NUM_BINS = 40
# Its contrast is 6.7 on white.
_COLOUR = "#0b5cad"
_PLOTS = (
    ("kept_mass", "Kept mass", "probability kept, mean of an utterance"),
    ("entropy", "Entropy", "entropy, nats, mean of an utterance"),
    ("agreement", "Agreement with hard labels", "share of an utterance's frames"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """``svg`` is None where there is nothing to draw; ``caption`` then says why."""

    title: str
    svg: Markup | None
    caption: str


def quality_plots(dataset: SoftLabelDataset) -> list[Plot]:
    """Raises IntegrityError, OSError where a shard cannot be read."""
    shards = [index for index, shard in enumerate(dataset.manifest.shards) if shard.num_frames]
    read = [shards[index] for index in evenly_spaced(len(shards), _MAX_SHARDS)]
    columns = [dataset.shards.read_columns(index)[1] for index in read]
    if not columns:
        return [Plot(title=title, svg=None, caption="No utterance has frames.") for _, title, _ in _PLOTS]
    frames_N = np.concatenate([each.num_frames for each in columns])
    of = "" if len(read) == len(shards) else f" Of {len(read)} of {len(shards):,} shards, spread evenly."
    return [
        _histogram(name, title, label, np.concatenate([getattr(each, name) for each in columns]), frames_N, of)
        for name, title, label in _PLOTS
    ]


def _histogram(
    name: str,
    title: str,
    label: str,
    values_N: npt.NDArray[np.float32],
    frames_N: npt.NDArray[np.int32],
    of: str,
) -> Plot:
    """Utterances count by their frames; ``values_N`` NaN: the utterance has no such value."""
    known_N = np.isfinite(values_N) & (frames_N > 0)
    if not known_N.any():
        return Plot(title=title, svg=None, caption="No utterance has hard labels.")
    values_N, frames_N = values_N[known_N], frames_N[known_N]
    low, high = float(values_N.min()), float(values_N.max())
    edges = np.linspace(low, high, _NUM_BINS + 1) if low < high else np.linspace(low - 0.005, low + 0.005, 3)
    shares = np.histogram(values_N, edges, weights=100 * frames_N / frames_N.sum())[0]

    def draw(axes: Any) -> None:
        axes.stairs(shares, edges, fill=True, color=_COLOUR, alpha=0.25)
        axes.stairs(shares, edges, color=_COLOUR, lw=1.6)
        axes.set(xlabel=label, ylabel="share of frames, %")

    mean = float(np.average(values_N.astype(np.float64), weights=frames_N))
    tenth, median, ninetieth = np.quantile(values_N, (0.1, 0.5, 0.9))
    text = (
        f"Mean over frames {mean:.3f}; of {len(values_N):,} utterances one in ten is below {tenth:.3f}, half are below "
        f"{median:.3f}, one in ten is above {ninetieth:.3f}.{of}"
    )
    return Plot(title=title, svg=inline_svg(name.replace("_", "-"), title, text, draw), caption=text)
