"""Where the time of the steps went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from seqkd.report.curves import POINTS, Array, column
from seqkd.report.panels import Panel
from seqkd.report.svg import COLOUR, plot, series_colour
from seqkd.storage.run_reader import Run
from seqkd.training.clock import STAGES

NAMES = (*STAGES, "other")
LAST = 5
"""Steps of the chart of single steps."""


@dataclass(frozen=True)
class Stage:
    """One row of the table."""

    name: str
    colour: str
    """A variable of the style sheet."""
    seconds: float
    share: float
    median: float
    """Seconds of a step."""


def seconds(run: Run) -> tuple[Array, Array] | None:
    """[N] steps and [S, N] the seconds of each stage in each; what is left of a step is "other".
    Only of the steps whose time is known."""
    total = column(run.rows, "time_step_s")
    known = np.isfinite(total)
    if not known.any():
        return None
    stages = np.array([np.nan_to_num(column(run.rows, f"time_{s}_s")) for s in STAGES])
    other = np.maximum(total - stages.sum(0), 0)
    steps = np.array([row["step"] for row in run.rows], dtype=float)
    return steps[known], np.vstack([stages, other])[:, known]


def table(run: Run) -> list[Stage]:
    """The stages with their share of the time, in their order within a step."""
    found = seconds(run)
    if found is None:
        return []
    _, each = found
    whole = max(each.sum(), 1e-12)
    return [
        Stage(
            name, f"series-{i + 1}", each[i].sum(), each[i].sum() / whole, float(np.median(each[i]))
        )
        for i, name in enumerate(NAMES)
    ]


def stacked(run: Run, index: int = 0) -> Panel | None:
    """Seconds a step, stage upon stage; of many steps the mean of several."""
    found = seconds(run)
    if found is None:
        return None
    steps, each = found
    parts = np.array_split(np.arange(len(steps)), -(-len(steps) // -(-len(steps) // POINTS)))
    heights = np.array([each[:, part].mean(1) for part in parts]).T
    edges = np.array([*(steps[part[0]] for part in parts), steps[-1] + 1])
    title = "Seconds a step, by stage"
    with plot(f"stages-{index}", title) as made:
        bottom = np.zeros(len(parts))
        for i, height in enumerate(heights):
            made.axes.stairs(
                bottom + height, edges, baseline=bottom, fill=True, color=series_colour(i),
                linewidth=0,
            )  # fmt: skip
            bottom = bottom + height
        made.axes.set_xlim(edges[0], edges[-1])
        made.axes.set_ylim(0, None)
        _ticks(made.axes, "optimizer step")
        made.description = "; ".join(
            f"{name} {height.mean():.3g} s in the mean"
            for name, height in zip(NAMES, heights, strict=True)
        )
    return Panel(title, "seconds", made.svg)


def gantt(run: Run) -> Panel | None:
    """The stages of the last steps one after the other, from their durations."""
    found = seconds(run)
    if found is None:
        return None
    steps, each = (values[..., -LAST:] for values in found)
    title = f"The last {len(steps)} steps" if len(steps) > 1 else "The last step"
    with plot("gantt", title) as made:
        start = 0.0
        for step, of_step in zip(steps, each.T, strict=True):
            made.axes.axvline(start, color=COLOUR["line"], linewidth=1)
            made.axes.text(
                start, 1.02, f" {step:.0f}", transform=made.axes.get_xaxis_transform(), fontsize=10
            )
            for i, duration in enumerate(of_step):
                made.axes.barh(i, duration, left=start, height=0.62, color=series_colour(i))
                start += duration
        made.axes.set_xlim(0, max(start, 1e-9))
        made.axes.set_yticks(range(len(NAMES)), NAMES)
        made.axes.invert_yaxis()
        made.axes.grid(False, axis="y")
        _ticks(made.axes, "seconds", y=False)
        made.description = _spoken(steps, each)
    return Panel(title, "stage after stage", made.svg)


def _spoken(steps: Array, each: Array) -> str:
    return "; ".join(
        f"step {step:.0f}: " + ", ".join(f"{n} {s:.2g} s" for n, s in zip(NAMES, of, strict=True))
        for step, of in zip(steps, each.T, strict=True)
    )


def _ticks(axes: Any, label: str, y: bool = True) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(label, fontsize=10.5, labelpad=5)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    if y:
        axes.yaxis.set_major_locator(MaxNLocator(5))


def panels(runs: Sequence[Run]) -> list[tuple[str, Panel]]:
    """Name of the run and its plot; of one run the last steps too."""
    made = [(run.name, stacked(run, i)) for i, run in enumerate(runs)]
    if len(runs) == 1:
        made.append((runs[0].name, gantt(runs[0])))
    return [(name, panel) for name, panel in made if panel]
