"""Means and differences of methods that were run with several seeds on the same prompts.

Runs and prompts are two crossed samples: another seed would give another student, and other
prompts would give other figures. Let R_s be the figure of run s of S, and u_i the influence of
prompt i of P on the mean of the figures (delta method for a ratio of sums). The variance of the
mean is estimated by

    var(u) / P + var(R) / S.

This counts the interaction of runs and prompts twice, so the intervals are slightly wide, as those
of the pigeonhole bootstrap (Owen 2007, arXiv 0712.1111).

Tests and intervals use the critical values of Cochran and Cox (1957, Experimental Designs): the
mean of the Student t critical values of both parts (P - 1 and S - 1 degrees of freedom), weighted
by the parts. Welch and Satterthwaite's degrees of freedom are too many if the few seeds agree by
chance (``python scripts/intervals.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy.optimize import bisect
from scipy.special import stdtrit

from seqkd.evaluation.intervals import Array, Ratio

SMALLEST = 1e-16
"""Smallest p-value that is computed. A smaller one is 0."""


@dataclass(frozen=True)
class Estimate:
    """Mean over runs with its 95 % interval."""

    mean: float
    low: float
    high: float
    p: float
    """Two-sided p-value of the hypothesis that the mean is 0; meaningful for differences."""
    of_seeds: tuple[float, ...]
    """[S] mean of each run."""


def estimate(runs: Sequence[Ratio]) -> Estimate:
    """Estimate a figure of one method from [S] runs, one per seed. With a single run, the interval
    is over prompts only."""
    return _estimate(*map(np.array, zip(*map(_linear, runs), strict=True)))


def difference(runs: Sequence[Ratio], baseline: Sequence[Ratio]) -> Estimate:
    """Estimate runs - baseline, paired by seed and by prompt, from [S] runs of each in the same
    order. Prompts where the figure is defined for only one run of a pair are dropped."""
    values, influences = [], []
    for run, other in zip(runs, baseline, strict=True):
        both = ((run.below > 0) & (other.below > 0)).astype(float)
        a, b = (_linear(Ratio(r.above * both, r.below * both)) for r in (run, other))
        values.append(a[0] - b[0])
        influences.append(a[1] - b[1])
    return _estimate(np.array(values), np.array(influences))


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Adjust p-values for the number of tests (Holm 1979). An adjusted p-value is the smallest
    family-wise level at which the test is significant."""
    adjusted, highest = {}, 0.0
    for rank, name in enumerate(sorted(p, key=lambda name: p[name])):
        highest = max(highest, min(1.0, (len(p) - rank) * p[name]))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p}


def critical_value(p: Array | float, parts: Sequence[tuple[Array | float, int]]) -> Array:
    """Return the critical value of Cochran and Cox: the mean divided by its standard error at which
    the two-sided p-value is ``p``.

    Args:
        p: two-sided p-value, 0 to 1.
        parts: estimated parts of the variance, of which at least one is above 0, with their degrees
            of freedom.
    """
    total = sum(variance for variance, _ in parts)
    return np.asarray(sum(-stdtrit(freedom, p / 2) * part / total for part, freedom in parts))


def _linear(ratio: Ratio) -> tuple[float, Array]:
    """Return the quotient and [P] the influence of each prompt: P times the first-order change of
    the quotient when the weight of the prompt is doubled."""
    below = ratio.below.sum()
    value = ratio.above.sum() / below
    return value, (ratio.above - value * ratio.below) * len(ratio.below) / below


def _excess(statistic: float, parts: Sequence[tuple[Array | float, int]], p: float) -> float:
    return float(critical_value(p, parts)) - statistic


def _estimate(values: Array, influences: Array) -> Estimate:
    """Estimate the mean from [S] figures and [S, P] influences."""
    runs, prompts = influences.shape
    parts = [(np.var(influences.mean(0), ddof=1) / prompts, prompts - 1)] if prompts > 1 else []
    if runs > 1:
        parts.append((np.var(values, ddof=1) / runs, runs - 1))
    parts = [(variance, freedom) for variance, freedom in parts if variance > 0]
    mean, width, p = float(values.mean()), 0.0, 1.0
    if parts:
        deviation = sum(variance for variance, _ in parts) ** 0.5
        width = float(critical_value(0.05, parts) * deviation)
        excess = partial(_excess, abs(mean) / deviation, parts)
        p = bisect(excess, SMALLEST, 1, xtol=SMALLEST) if excess(SMALLEST) > 0 else 0.0
    elif mean:
        p = 0.0
    return Estimate(mean, mean - width, mean + width, p, tuple(map(float, values)))
