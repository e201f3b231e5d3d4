"""The plots of a comparison: figures with their intervals, and what they cost to reach."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from seqkd.comparison.statistics import Estimate
from seqkd.report import plots
from seqkd.report.curves import Array, Axis, spent
from seqkd.report.panels import Panel
from seqkd.report.svg import COLOUR, SERIES, Plot, plot, series_colour
from seqkd.storage.run_reader import Run

LINES = ("solid", (0, (4.5, 2)), (0, (1.2, 1.5)))
"""Of the first methods, of the next when the colours begin again, and of those after."""
ROW = 53
"""Height of each in it, about that of a row of the table beside it."""
LONGEST = 20
"""Characters of a name beside a plot."""


@dataclass(frozen=True)
class Mark:
    """One method in a plot of intervals."""

    index: int
    name: str
    of: Estimate | None
    """None before it has a run that is over: its row stays empty."""
    real: bool
    """Whether it is told apart from the baseline."""


def line(index: int) -> int:
    """Which of :data:`LINES` a method has."""
    return index // SERIES % len(LINES)


def forest(
    name: str, title: str, unit: str, marks: Sequence[Mark], baseline: str, teacher: float | None
) -> Panel | None:
    """Mean, interval and seeds of each method below each other; the baseline's mean as a dashed
    line, the teacher's as a dotted one."""
    if not any(mark.of for mark in marks):
        return None
    labels = [f"{mark.index + 1} {_short(mark.name)}" for mark in marks]
    left = 16 + round(6.1 * max(map(len, labels)))
    with plot(name, f"{title}: every method", 56 + ROW * len(marks), left) as made:
        for mark in marks:
            if mark.of and mark.name == baseline:
                made.axes.axvline(
                    mark.of.mean, color=COLOUR["muted"], linewidth=1.2, dashes=(4, 3), zorder=1
                )
        if teacher is not None:
            made.axes.axvline(
                teacher, color=COLOUR["ink"], linewidth=1.4, dashes=(1, 1.6), zorder=1
            )
            made.description += f"The teacher: {teacher:.3g}. "
        for row, mark in enumerate(marks):
            if mark.of:
                _interval(made, row, mark, mark.of, mark.name == baseline)
        made.axes.set_yticks(range(len(marks)), labels)
        for tick, mark in zip(made.axes.get_yticklabels(), marks, strict=True):
            tick.set_color(series_colour(mark.index))
        made.axes.set_ylim(len(marks) - 0.5, -0.5)
        made.axes.margins(x=0.06)
        made.axes.grid(False, axis="y")
        made.axes.grid(True, axis="x")
        made.axes.set_xlabel(unit, fontsize=10.5, labelpad=5)
        _ticks(made)
    return Panel(title, "", made.svg)


def _interval(made: Plot, row: int, mark: Mark, of: Estimate, baseline: bool) -> None:
    colour = series_colour(mark.index)
    made.axes.plot([of.low, of.high], [row, row], color=colour, linewidth=2.2)
    made.axes.plot(
        [of.mean], [row], "D" if baseline else "o", color=colour, markersize=7, markeredgewidth=1.8,
        markerfacecolor=colour if mark.real or baseline else COLOUR["paper"], zorder=4,
    )  # fmt: skip
    if len(of.of_seeds) > 1:
        made.axes.plot(
            of.of_seeds, [row + 0.24] * len(of.of_seeds), "o", color=colour, markersize=3.2,
            alpha=0.75, markeredgewidth=0, clip_on=False,
        )  # fmt: skip
    made.description += f"{mark.name}: {of.mean:.3g}, from {of.low:.3g} to {of.high:.3g}. "


@dataclass(frozen=True)
class Path:
    """A figure of one method over what it had cost."""

    x: Array
    y: Array
    """[M] means over the seeds at the measurements that all of them have."""
    seeds: list[Array]
    """[2, N] cost and figure of each seed, at every measurement of it."""


def path(runs: Sequence[Run], figure: str, on: Axis) -> Path | None:
    """None where no run has the figure."""
    of_runs = [_measured(run, figure, on) for run in runs]
    of_runs = [found for found in of_runs if found]
    if not of_runs:
        return None
    shared = [stage for stage in of_runs[0] if all(stage in found for found in of_runs)]
    x, y = np.array([[found[s] for s in shared] for found in of_runs]).mean(0).T
    return Path(x, y, [np.array([*of.values()]).T for of in of_runs])


def _measured(run: Run, figure: str, on: Axis) -> dict[str, tuple[float, float]]:
    """By stage, in the order of the steps: what had been spent, and the figure."""
    at = spent(run, on)
    found = sorted((s, stage, of) for stage, (s, of) in run.figures.items() if figure in of)
    return {stage: (float(at.before(step)), of[figure].mean) for step, stage, of in found}


def against_cost(
    name: str, title: str, unit: str, figure: str, runs: Mapping[int, tuple[str, Sequence[Run]]],
    on: Axis, teacher: str,
) -> Panel | None:  # fmt: skip
    """A line a method over its held-out measurements, each seed thin. ``runs``: by the number of
    the method its name and its runs; ``teacher``: the teacher's figure, a dashed line."""
    paths = {i: (who, p) for i, (who, of) in runs.items() if (p := path(of, figure, on))}
    if not paths:
        return None
    every = [run for _, of in runs.values() for run in of]
    figures = [of for run in every for _, of in run.figures.values()]
    with plot(name, f"{title} against {plots.AXES[on]}") as made:
        for index, (who, of) in paths.items():
            _path(made, index, of)
            made.description += (
                f"{who}: from {of.y[0]:.3g} at {of.x[0]:.4g} to {of.y[-1]:.3g} at {of.x[-1]:.4g}. "
            )
        if known := [of[teacher].mean for of in figures if teacher in of]:
            made.axes.axhline(known[-1], color=COLOUR["muted"], linewidth=1.2, dashes=(4, 3))
            made.description += f"The teacher: {known[-1]:.3g}."
        if _logarithmic(figure, paths.values()):
            made.axes.set_yscale("log")
            unit += ", log scale"
        plots.frame(made, every, on)
        plots.numbers(made, [(float(p.y[-1]), index) for index, (_, p) in paths.items()])
    return Panel(title, unit, made.svg)


def _path(made: Plot, index: int, of: Path) -> None:
    colour, style = series_colour(index), LINES[line(index)]
    for x, y in of.seeds if len(of.seeds) > 1 else ():
        made.axes.plot(x, y, color=colour, linestyle=style, linewidth=0.8, alpha=0.45)
    made.axes.plot(of.x, of.y, color=colour, linestyle=style, linewidth=2)
    made.axes.plot(of.x, of.y, "o", color=colour, markersize=3.6)


def _logarithmic(figure: str, paths: Iterable[tuple[str, Path]]) -> bool:
    """Of divergences that fall so far that methods cannot be told apart at their ends."""
    values = np.concatenate([of.y for _, of in paths])
    return "_kl_" in figure and bool(0 < 2 * values.min() < values.max())


def _ticks(made: Plot) -> None:
    from matplotlib.ticker import MaxNLocator

    made.axes.xaxis.set_major_locator(MaxNLocator(5))


def _short(name: str) -> str:
    """What tells two methods apart is as often at the end as at the beginning."""
    half = LONGEST // 2
    return name if len(name) <= LONGEST else f"{name[: half - 1]}…{name[-half:]}"
