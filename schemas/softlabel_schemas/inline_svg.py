"""A figure by matplotlib as an SVG element for a page: the same data give the same bytes. Needs matplotlib and markupsafe."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.figure import Figure

_STYLE = {
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
_SIZE_INCHES = (4.6, 3.15)


def inline_svg(name: str, title: str, text: str, draw: Callable[[Any], None]) -> Markup:
    """An SVG element whose ids begin with ``name``, so that several fit into one page.

    Args:
        title, text: what those hear who do not see it.
        draw: given the axes.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context():
        # A matplotlibrc of the reader's must not change the page.
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({**_STYLE, "svg.hashsalt": name})
        figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
        draw(figure.add_subplot())
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    tag, rest = svg.split(">", 1)
    tag = re.sub(r' (width|height)="[^"]*"', "", tag)
    head = f'{tag} role="img" aria-labelledby="{name}-title {name}-text">'
    return Markup(  # noqa: S704 - matplotlib escapes its text, and ours is escaped here
        f'{head}<title id="{name}-title">{escape(title)}</title><desc id="{name}-text">{escape(text)}</desc>{rest}'
    )
