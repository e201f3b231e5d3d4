"""How the figures of runs are drawn into a plot."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from seqkd.report.curves import Array, Axis, Curve, curves, spent
from seqkd.report.svg import COLOUR, Plot, series_colour
from seqkd.storage.run_reader import Run

AXES: dict[Axis, str] = {
    "steps": "optimizer steps taken",
    "learner_tokens": "completion tokens learnt from",
    "sampled_tokens": "completion tokens sampled",
    "teacher_tokens": "tokens that the teacher wrote or scored",
    "seconds": "minutes of training steps",
    "prompts": "prompts drawn",
}


@dataclass(frozen=True)
class Track:
    """One column of one run, as one coloured line."""

    run: Run
    key: str
    name: str
    colour: int


def tracks(made: Plot, found: Sequence[Track], on: Axis, smooth: bool) -> None:
    """Every step faintly, and a smooth line over it; steps that were skipped as crosses."""
    for track in found:
        at = spent(track.run, on)
        drawn = list(curves(track.run, track.key, at.amount[:-1], smooth))
        for curve in drawn:
            _curve(made, curve, series_colour(track.colour))
        made.description += _said(track.name, drawn)
        skipped = [row["step"] for row in track.run.rows if row.get("skipped")]
        made.axes.plot(
            at.before(np.array(skipped, dtype=float)),
            np.full(len(skipped), 0.035),
            "x",
            color=COLOUR["ink"],
            markersize=5,
            transform=made.axes.get_xaxis_transform(),
            clip_on=False,
        )


def held_out(
    made: Plot, run: Run, index: int, of: int, figure: str, teacher: str, on: Axis
) -> None:
    """What was measured on held-out prompts, with intervals; the teacher's as a dashed line. Of
    several runs each stands a little beside the next."""
    at = spent(run, on)
    stages = [(at.before(s), found) for s, found in run.figures.values() if figure in found]
    if not stages:
        return
    x = np.array([where for where, _ in stages]) + (index - (of - 1) / 2) * at.amount[-1] / 70
    values = [found[figure] for _, found in stages]
    mean = np.array([v.mean for v in values])
    made.axes.errorbar(
        x,
        mean,
        # A bootstrap interval of few prompts may leave the mean out.
        [[max(v.mean - v.low, 0) for v in values], [max(v.high - v.mean, 0) for v in values]],
        fmt="D",
        color=series_colour(index) if of > 1 else COLOUR["ink"],
        markersize=6 if of == 1 else 5,
        markeredgecolor=COLOUR["paper"],
        markeredgewidth=0.8,
        elinewidth=1.4,
        capsize=3 if of == 1 else 0,
        zorder=5,
        clip_on=False,
    )
    made.description += f" On held-out prompts: {', then '.join(map(str, values))}."
    known = [found[teacher] for _, found in stages if teacher in found]
    if known and index == 0:
        made.axes.axhline(known[-1].mean, color=COLOUR["muted"], linewidth=1.2, dashes=(4, 3))
        made.description += f" The teacher: {known[-1]}."


def ends(found: Sequence[Track], on: Axis, smooth: bool) -> list[tuple[float, int]]:
    """Where each line ends, and its colour."""
    last = [[*curves(t.run, t.key, spent(t.run, on).amount[:-1], smooth)][-1] for t in found]
    return [(float(curve.y[-1]), t.colour) for curve, t in zip(last, found, strict=True)]


def numbers(made: Plot, ends: Sequence[tuple[float, int]]) -> None:
    """At the right edge the number of each line, as high as it ends, or as near to that as the
    others leave room; drawn when the limits of the axes are final."""
    made.axes.autoscale_view()
    to_page, to_data = made.axes.transData, made.axes.transData.inverted()
    right, top = made.axes.transAxes.transform((1, 1))
    ordered = sorted(ends)
    heights = apart([to_page.transform((0, end))[1] - 5 for end, _ in ordered], 15, top)
    for height, (_, colour) in zip(heights, ordered, strict=True):
        where = to_data.transform((right + 4, height))
        made.axes.text(*where, str(colour + 1), color=series_colour(colour), fontweight="bold")


def apart(heights: Sequence[float], gap: float, top: float) -> list[float]:
    """Ascending heights so moved that ``gap`` is between them, none above ``top``: up where the one
    below is in the way, then down from the top."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + gap) if placed else height)
    for index in reversed(range(len(placed))):
        placed[index] = min(placed[index], top)
        top = placed[index] - gap
    return placed


def frame(made: Plot, runs: Sequence[Run], on: Axis) -> None:
    """Limits, label and ticks of the axes; the phases as bands, where all runs have the same."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    axes = made.axes
    end = max([1e-9, *(spent(run, on).amount[-1] for run in runs)])
    axes.set_xlim(-0.025 * end, 1.025 * end)  # so that what is measured at either end is seen whole
    axes.margins(y=0.12)
    axes.set_xlabel(AXES[on], fontsize=10.5, labelpad=5)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=on == "steps"))
    if axes.get_yscale() == "log":
        low, high = axes.get_ylim()
        subs = (1,) if high > 100 * low else (1, 1.5, 2, 3, 5, 7)
        axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=5))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(_plain))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.get_offset_text().set(x=-0.168, fontsize=9.5)
    spans = {tuple(run.spans) for run in runs}
    if len(spans) == 1 and (len(runs) == 1 or on == "steps"):
        _bands(made, runs[0], on)


def _plain(value: float, _: int) -> str:
    """Powers of ten without superscripts, which are drawn from a font that the page has not."""
    return re.sub(r"e([+-])0?", lambda m: "e" + m[1].strip("+"), f"{value:g}")


def _bands(made: Plot, run: Run, on: Axis) -> None:
    at, spans = spent(run, on), [span for span in run.spans if span.begin < run.done]
    if len(spans) < 2:
        return
    for index, span in enumerate(spans):
        low, high = at.before(span.begin), at.before(span.end)
        if index % 2 == 0:
            made.axes.axvspan(low, high, color=COLOUR["band"], linewidth=0, zorder=0)
        made.axes.text(
            low, 1.02, f" {span.name}", transform=made.axes.get_xaxis_transform(), fontsize=10
        )


def _curve(made: Plot, curve: Curve, colour: str) -> None:
    if (curve.low < curve.high).any():  # each point stands for several steps
        made.axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.2, linewidth=0)
    elif curve.window > 1:
        _dots(made, curve.x, curve.low, colour)
    elif len(curve.x) == 1:  # no line
        made.axes.plot(curve.x, curve.y, "o", color=colour, markersize=4)
    made.axes.plot(curve.x, curve.y, color=colour, linewidth=1.8, solid_joinstyle="round")


def _dots(made: Plot, x: Array, y: Array, colour: str) -> None:
    """As lines of no length with round ends: one element in place of hundreds."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    points = np.repeat(np.column_stack([x, y]), 2, axis=0)
    codes = [Path.MOVETO, Path.LINETO] * len(x)
    style: dict[str, Any] = {"fill": False, "capstyle": "round", "linewidth": 3.4, "alpha": 0.45}
    made.axes.add_patch(PathPatch(Path(points, codes), edgecolor=colour, **style))
    made.axes.autoscale_view()


def _said(name: str, drawn: Sequence[Curve]) -> str:
    low, high = (f([f(part) for part in parts]) for f, parts in (
        (min, [c.low for c in drawn]), (max, [c.high for c in drawn])
    ))  # fmt: skip
    return (
        f" {name}: from {drawn[0].y[0]:.3g} to {drawn[-1].y[-1]:.3g}; lowest {low:.3g}, highest "
        f"{high:.3g}."
    )
