"""Small plots as SVG that belongs into a page: text is text, colours are those of the page's style
sheet, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from typing import Any

from markupsafe import Markup

WIDTH, HEIGHT = 380, 216
"""Of a plot, in units of the SVG: about as many pixels on the page."""
SERIES = 6
"""Different colours of curves; then they begin again."""
_NAMES = ("ink", "muted", "line", "band", "paper", *(f"series-{i}" for i in range(1, SERIES + 1)))
# matplotlib wants colours, the page variables: these stand for them, as nothing else has them.
_STANDS_FOR = {f"#0102{index:02x}": name for index, name in enumerate(_NAMES, 3)}
COLOUR = {name: code for code, name in _STANDS_FOR.items()}
"""By the name of a variable of the style sheet, what to draw with."""


def series_colour(index: int) -> str:
    """Of the curve with this number, from 0."""
    return COLOUR[f"series-{index % SERIES + 1}"]


@dataclass
class Plot:
    """One plot while it is drawn."""

    axes: Any
    """matplotlib's."""
    description: str = ""
    """What can be seen in it, in words."""
    svg: Markup = field(default_factory=Markup)
    """Empty until it is done."""


@contextmanager
def plot(name: str, title: str, height: int = HEIGHT, left: int = 52) -> Iterator[Plot]:
    """Empty axes to draw on; ``name`` is unique in the page, ``title`` is read out to those who do
    not see it, ``left`` is the room for what stands beside the axes."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,  # so that no two plots of a page have the same ids
        "svg.id": None,
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": COLOUR["line"],
        "axes.labelcolor": COLOUR["muted"],
        "axes.formatter.limits": (-4, 5),
        "axes.formatter.use_mathtext": False,
        "axes.unicode_minus": True,
        "text.color": COLOUR["muted"],
        "xtick.color": COLOUR["line"],
        "ytick.color": COLOUR["line"],
        "xtick.labelcolor": COLOUR["muted"],
        "ytick.labelcolor": COLOUR["muted"],
        "grid.color": COLOUR["line"],
        "grid.linewidth": 0.7,
        "path.simplify": False,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(WIDTH / 72, height / 72))
        FigureCanvasSVG(figure)
        size = (1 - (left + 20) / WIDTH, 1 - 52 / height)
        axes = figure.add_axes((left / WIDTH, 36 / height, *size))
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        axes.grid(True, axis="y")
        axes.set_axisbelow(True)
        axes.tick_params(length=0, pad=5)
        made = Plot(axes)
        yield made
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    made.svg = _for_page(out.getvalue(), name, title, made.description)


def _for_page(text: str, name: str, title: str, description: str) -> Markup:
    body = text[text.index("<svg") :]
    view = re.search(r'viewBox="([^"]+)"', body)
    assert view is not None
    body = body[body.index(">") + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)  # it would rule the whole page
    body = re.sub(r"<!--.*?-->\s*", "", body, flags=re.DOTALL)
    body = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", body)
    body = re.sub(r' (d|x|y|transform)="[^"]*"', lambda m: _short(m[0]), body)
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', body))
    body = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", body)
    for code, variable in _STANDS_FOR.items():
        body = body.replace(code, f"var(--{variable})")
    head = (
        f'<svg class="plot" role="img" viewBox="{view[1]}" preserveAspectRatio="xMidYMid meet" '
        f'aria-labelledby="{name}-title {name}-desc"><title id="{name}-title">{escape(title)}'
        f'</title><desc id="{name}-desc">{escape(description)}</desc>'
    )
    return Markup(head + re.sub(r"\n\s*", "\n", body).strip())


def _short(attribute: str) -> str:
    """With coordinates to a tenth of what can be seen."""
    return " " + re.sub(r"(\d\.\d\d)\d+", r"\1", " ".join(attribute.split()))
