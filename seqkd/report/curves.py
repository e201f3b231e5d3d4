"""Data of plots: metrics by step, cumulative costs, smoothed curves, held-out figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from seqkd.config.base import BudgetKind
from seqkd.evaluation.summary import number
from seqkd.storage.metrics_file import Row
from seqkd.storage.run_reader import Run

Array = np.ndarray
CostAxis = Literal["steps"] | BudgetKind
"""Horizontal axis of a plot: steps or a kind of cost."""
POINTS = 300
"""Maximum number of points of a curve."""


def column(rows: Sequence[Row], key: str) -> Array:
    """Return [N] values of a metric, NaN where it is missing."""
    values = [number(row, key) for row in rows]
    return np.array([np.nan if v is None else v for v in values], dtype=float)


def spent(run: Run, on: CostAxis) -> Array:
    """Return [N + 1] the cumulative cost before each row and after the last. Seconds are converted
    to minutes."""
    if on == "steps":
        return np.array([row["step"] for row in run.rows] + [run.done], dtype=float)
    each = np.array(run.costs(on)) / (60 if on == "seconds" else 1)
    return np.concatenate([[0.0], np.cumsum(each)])


def spent_before(run: Run, on: CostAxis, step: float | Array) -> Array:
    """Return the cumulative cost before ``step``, interpolated between rows."""
    return np.asarray(np.interp(step, spent(run, "steps"), spent(run, on)))


@dataclass(frozen=True)
class Curve:
    """Curve of one metric over one phase, M points."""

    x: Array
    """[M] position on the horizontal axis."""
    low: Array
    """[M] minimum over the steps of a point."""
    high: Array
    """[M] maximum over the steps of a point."""
    y: Array
    """[M] moving mean, or the mean over the steps of a point."""
    window: int
    """Number of steps in a mean."""


def curves(run: Run, key: str, x: Array) -> Iterator[Curve]:
    """Yield one curve per phase over the rows that have the metric.

    ``x`` [N] is the position of each row. With up to :data:`POINTS` rows, the curve is a centered
    moving mean over about a tenth of the phase. With more rows, each point combines several steps.
    """
    values = column(run.rows, key)
    steps = np.array([row["step"] for row in run.rows])
    per_point = -(-len(steps) // POINTS)
    for span in run.spans:
        here = (steps >= span.begin) & (steps < span.end) & np.isfinite(values)
        if not here.any():
            continue
        phase, at = values[here], x[here]
        if per_point > 1:
            parts = np.array_split(np.arange(len(phase)), -(-len(phase) // per_point))
            middle, low, high, mean = (
                np.array([reduce(source[part]) for part in parts])
                for reduce, source in (
                    (np.mean, at), (np.min, phase), (np.max, phase), (np.mean, phase)
                )
            )  # fmt: skip
            yield Curve(middle, low, high, mean, per_point)
        else:
            half = len(phase) // 20
            yield Curve(at, phase, phase, moving_mean(phase, half), 2 * half + 1)


def moving_mean(values: Array, half: int) -> Array:
    """Return [N] the mean of each value with up to ``half`` values on either side."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    first, last = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return np.asarray((sums[last] - sums[first]) / (last - first))


def paths(runs: Sequence[Run], figure: str, on: CostAxis) -> tuple[Array, list[Array]] | None:
    """Return costs and held-out figures of several runs: [2, M] means over the runs at the
    measurements that all runs have, and [2, N] all measurements of each run. None if no run has the
    figure."""
    measured = []
    for run in runs:
        stages = sorted((step, s, row) for s, (step, row) in run.figures.items() if figure in row)
        points = {
            s: (float(spent_before(run, on, step)), row[figure].mean) for step, s, row in stages
        }
        measured += [points] if points else []
    if not measured:
        return None
    common = [stage for stage in measured[0] if all(stage in points for points in measured)]
    mean = np.array([[points[stage] for stage in common] for points in measured]).mean(0).T
    return mean, [np.array([*points.values()]).T for points in measured]
