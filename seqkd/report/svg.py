"""Small plots as inline SVG with text elements; colors are variables of the style sheet."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from typing import Any

from markupsafe import Markup

WIDTH, HEIGHT = 380, 216
"""Size of a plot in SVG units, which are about one pixel on the page."""
SERIES = 6
"""Number of colors of curves."""
DASHES = ("solid", (0, (4.5, 2)), (0, (1.2, 1.5)))
"""Line styles: the first for the first :data:`SERIES` curves, the next for the next ones."""
_NAMES = ("ink", "muted", "line", "band", "paper", *(f"series-{i}" for i in range(1, SERIES + 1)))
# matplotlib requires colors and the page uses variables: these placeholder colors are replaced.
_CODES = {f"#0102{index:02x}": name for index, name in enumerate(_NAMES, 3)}
COLOR = {name: code for code, name in _CODES.items()}
"""matplotlib color of each variable of the style sheet."""


@dataclass(frozen=True)
class Key:
    """Label and style of a run, a method or a stage."""

    index: int
    label: str

    @property
    def variable(self) -> str:
        """Color as a variable of the style sheet."""
        return f"series-{self.index % SERIES + 1}"

    @property
    def dash(self) -> int:
        """Index of the line style in :data:`DASHES`."""
        return self.index // SERIES % len(DASHES)

    @property
    def line(self) -> dict[str, Any]:
        """Line properties for matplotlib."""
        return {"color": COLOR[self.variable], "linestyle": DASHES[self.dash]}


@dataclass(frozen=True)
class Panel:
    """Finished plot with its title."""

    title: str
    unit: str
    svg: Markup
    keys: Sequence[Key] = ()
    """Legend below the plot."""


@dataclass
class Plot:
    """Plot that is being drawn."""

    axes: Any
    """Axes of matplotlib."""
    description: str = ""
    """Text description for screen readers."""
    svg: Markup = field(default_factory=Markup)
    """Finished plot; empty while it is drawn."""


@contextmanager
def plot(name: str, title: str) -> Iterator[Plot]:
    """Yield an empty plot to draw on. ``name`` must be unique in the page; ``title`` is for screen
    readers."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,  # so that ids are unique in the page
        "svg.id": None,
        "text.parse_math": False,
        "font.size": 11,
        "grid.linewidth": 0.7,
        "path.simplify": False,
    }
    style |= dict.fromkeys(("axes.spines.top", "axes.spines.right"), False)
    style |= dict.fromkeys(
        ("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), COLOR["line"]
    )
    text = ("axes.labelcolor", "text.color", "xtick.labelcolor", "ytick.labelcolor")
    style |= dict.fromkeys(text, COLOR["muted"])
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72))
        FigureCanvasSVG(figure)
        size = (1 - 72 / WIDTH, 1 - 52 / HEIGHT)
        axes = figure.add_axes((52 / WIDTH, 36 / HEIGHT, *size))
        for patch in (figure.patch, axes.patch):
            patch.set_visible(False)
        axes.grid(True, axis="y")
        axes.set_axisbelow(True)
        axes.tick_params(which="both", length=0, pad=5)
        drawn = Plot(axes)
        yield drawn
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    drawn.svg = _inline(out.getvalue(), name, title, drawn.description)


def _inline(text: str, name: str, title: str, description: str) -> Markup:
    view = re.search(r'viewBox="([^"]+)"', text)
    assert view is not None
    body = text[text.index(">", view.end()) + 1 :]
    body = re.sub(r"<(metadata|style).*?</\1>|<!--.*?-->\s*", "", body, flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', body))
    body = re.sub(r"<[^>]+>", lambda tag: _attributes(tag[0], used), body)
    head = (
        f'<svg class="plot" role="img" viewBox="{view[1]}" '
        f'aria-labelledby="{name}-title {name}-desc"><title id="{name}-title">{escape(title)}'
        f'</title><desc id="{name}-desc">{escape(description)}</desc>'
    )
    return Markup(head + re.sub(r"\n\s*", "\n", body).strip())


def _attributes(tag: str, used: set[str]) -> str:
    """Return a tag with shorter attributes, without unused ids, and with the page's colors."""
    tag = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", tag)
    tag = re.sub(r' (d|x|y|transform)="[^"]*"', lambda m: _short(m[0]), tag)
    tag = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", tag)
    for code, variable in _CODES.items():
        tag = tag.replace(code, f"var(--{variable})")
    return tag


def _short(attribute: str) -> str:
    """Return an attribute with coordinates truncated to two decimals, which is not visible."""
    return " " + re.sub(r"(\d\.\d\d)\d+", r"\1", " ".join(attribute.split()))
