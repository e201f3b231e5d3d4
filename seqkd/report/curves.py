"""What the rows of metrics.jsonl make up over the steps: columns, costs so far, smooth curves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from seqkd.config.base import BudgetKind
from seqkd.evaluation.summary import number
from seqkd.storage.run_reader import Row, Run

Array = np.ndarray
Axis = Literal["steps"] | BudgetKind
"""What figures are drawn against: steps, or what they cost."""
POINTS = 300
"""Up to so many steps each is a point of its own."""


def column(rows: Sequence[Row], key: str) -> Array:
    """[N] a figure of each row, nan where it is not known."""
    values = [number(row, key) for row in rows]
    return np.array([np.nan if v is None else v for v in values], dtype=float)


@dataclass(frozen=True)
class Spent:
    """What a run had spent before a step: the student of a row is the one before its update."""

    steps: Array
    """[N + 1] steps of the rows, and the one after the last."""
    amount: Array
    """[N + 1] spent before each."""

    def before(self, step: float | Array) -> Array:
        """Before such a step, which need not be one of the rows."""
        return np.asarray(np.interp(step, self.steps, self.amount))


def spent(run: Run, on: Axis) -> Spent:
    """In the unit of the axis."""
    steps = np.array([row["step"] for row in run.rows] + [run.done], dtype=float)
    if on == "steps":
        return Spent(steps, steps)
    each = np.array(run.costs(on)) / (60 if on == "seconds" else 1)
    return Spent(steps, np.concatenate([[0.0], np.cumsum(each)]))


@dataclass(frozen=True)
class Curve:
    """One figure over one phase."""

    x: Array
    low: Array
    high: Array
    """[M] the least and the greatest of the steps that a point stands for."""
    y: Array
    """[M] smooth: the mean of those around it."""
    window: int
    """Steps that the mean is of; 1 where it is the figure itself."""


def curves(run: Run, key: str, x: Array, smooth: bool = True) -> Iterator[Curve]:
    """A curve a phase, of the rows where the figure is known; ``x`` [N] is where each row stands.
    Up to :data:`POINTS` rows the mean is a centred one over about a tenth of the phase; of more,
    each point stands for several steps."""
    values = column(run.rows, key)
    steps = np.array([row["step"] for row in run.rows])
    per_point = -(-len(steps) // POINTS)
    for span in run.spans:
        here = (steps >= span.begin) & (steps < span.end) & np.isfinite(values)
        if not here.any():
            continue
        of, at = values[here], x[here]
        if per_point > 1:
            parts = np.array_split(np.arange(len(of)), -(-len(of) // per_point))
            low, high, mean, middle = (
                np.array([f(source[part]) for part in parts])
                for f, source in ((np.min, of), (np.max, of), (np.mean, of), (np.mean, at))
            )
            yield Curve(middle, low, high, mean, per_point)
        else:
            half = len(of) // 20 if smooth else 0
            yield Curve(at, of, of, moving_mean(of, half), 2 * half + 1)


def moving_mean(values: Array, half: int) -> Array:
    """[N] the mean of each value and up to ``half`` on either side."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    first, last = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return np.asarray((sums[last] - sums[first]) / (last - first))
