"""How every figure looks, and its SVG: the same numbers give the same text, whatever matplotlibrc the reader has.

Needs matplotlib and markupsafe.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.figure import Figure

# Each has a contrast of at least 4.5 on white.
COLOURS = ("#0b5cad", "#b3470b", "#1a7446", "#8a2f86", "#7a5c00", "#00707a", "#a81e3c", "#4a4a4a")
ENSEMBLE_COLOUR = "#1c1c1c"
_STYLE = {
    # Text is left as text: a reader's own fonts are used.
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
}
_INLINE_INCHES = (4.6, 3.15)


def svg(draw: Callable[[Any], None], *, size_inches: tuple[float, float], salt: str, background: str = "none") -> str:
    """What ``draw`` makes of a matplotlib Axes, as an SVG file's text.

    Args:
        salt: makes the ids, so that figures of one page have ids of their own.
        background: colour of the whole figure.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({**_STYLE, "svg.hashsalt": salt})
        figure = Figure(figsize=size_inches, layout="constrained", facecolor=background)
        draw(figure.add_subplot(facecolor="none"))
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    # What is left of the metadata names matplotlib's version.
    return re.sub(r"<metadata>.*?</metadata>\s*", "", buffer.getvalue(), flags=re.DOTALL)


def inline_svg(name: str, title: str, text: str, draw: Callable[[Any], None]) -> Markup:
    """An SVG element whose ids begin with ``name``, so that several fit into one page.

    Args:
        title, text: what those hear who do not see it.
        draw: given the axes.
    """
    found = svg(draw, size_inches=_INLINE_INCHES, salt=name)
    found = found[found.index("<svg") :]
    found = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", found)
    tag, rest = found.split(">", 1)
    tag = re.sub(r' (width|height)="[^"]*"', "", tag)
    head = f'{tag} role="img" aria-labelledby="{name}-title {name}-text">'
    return Markup(  # noqa: S704 - matplotlib escapes its text, and ours is escaped here
        f'{head}<title id="{name}-title">{escape(title)}</title><desc id="{name}-text">{escape(text)}</desc>{rest}'
    )
