"""Series over the steps of a run: columns, cumulative costs, smooth curves, held-out figures."""

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
"""The horizontal axis of a plot: steps, or a kind of cost."""
POINTS = 300
"""The largest number of points of a curve."""


def column(rows: Sequence[Row], key: str) -> Array:
    """Return [N] values of a metric, nan where it is not known."""
    values = [number(row, key) for row in rows]
    return np.array([np.nan if v is None else v for v in values], dtype=float)


def spent(run: Run, on: CostAxis) -> Array:
    """Return [N + 1] the cumulative cost before each row and after the last, seconds in minutes."""
    if on == "steps":
        return np.array([row["step"] for row in run.rows] + [run.done], dtype=float)
    each = np.array(run.costs(on)) / (60 if on == "seconds" else 1)
    return np.concatenate([[0.0], np.cumsum(each)])


def spent_before(run: Run, on: CostAxis, step: float | Array) -> Array:
    """Return the cumulative cost before steps, which need not be those of the rows."""
    return np.asarray(np.interp(step, spent(run, "steps"), spent(run, on)))


@dataclass(frozen=True)
class Curve:
    """One metric over one phase, [M] each."""

    x: Array
    low: Array
    high: Array
    """The least and the greatest value of the steps that a point stands for."""
    y: Array
    """Moving mean, or the mean of the steps that a point stands for."""
    window: int
    """Number of steps in a mean."""


def curves(run: Run, key: str, x: Array) -> Iterator[Curve]:
    """Yield one curve per phase, over the rows where the metric is known.

    ``x`` [N] is the place of each row. With up to :data:`POINTS` rows the mean is a centered one
    over about a tenth of the phase; with more, each point stands for several steps.
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
    """Return [N] the mean of each value and up to ``half`` values on either side."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    first, last = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return np.asarray((sums[last] - sums[first]) / (last - first))


def paths(runs: Sequence[Run], figure: str, on: CostAxis) -> tuple[Array, list[Array]] | None:
    """Return [2, M] the means over the runs at the measurements that all of them have, and [2, N]
    all measurements of each run: cost and held-out figure. None where no run has the figure."""
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
