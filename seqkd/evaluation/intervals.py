"""Intervals over prompts.

A figure is a function of sums over prompts. Its influences are estimated by the jackknife: the
figure is computed again without each prompt (Efron and Tibshirani 1993, chapter 11). Each bound is
the outer one of two: Student t, and Student t with Hall's correction for the skewness of the
influences (Hall 1992, "On the removal of skewness by transformation"). With 24 prompts neither is
wide enough alone for every kind of figure (``python scripts/intervals.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

KIND = "95 % jackknife interval over prompts"
"""Description of the intervals in evaluation.json."""

Array = np.ndarray


@dataclass(frozen=True)
class Interval:
    """Mean with its 95 % interval over prompts."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3g} [{self.low:.3g}, {self.high:.3g}]"

    def within(self, limits: tuple[float, float]) -> Interval:
        """Return the interval without the values outside ``limits``. It still contains the mean,
        which rounding can put outside: a divergence between equal models."""
        low, high = max(self.low, limits[0]), min(self.high, limits[1])
        return Interval(self.mean, min(self.mean, low), max(self.mean, high))

    @property
    def verdict(self) -> str:
        """Text that reports whether the interval of a difference excludes 0."""
        return "excludes 0" if self.low > 0 or self.high < 0 else "includes 0"


@dataclass(frozen=True)
class Ratio:
    """Figure as the quotient of two sums over prompts."""

    above: Array
    """[P] summands of the numerator."""
    below: Array
    """[P] summands of the denominator; 0 at prompts where the figure is undefined, which are
    dropped."""

    def interval(self) -> Interval:
        """Return the quotient with its interval over prompts."""
        defined = self.below > 0
        return ratio(self.above[defined], self.below[defined])

    def plain(self) -> dict[str, list[float]]:
        """Return the sums as plain data for JSON."""
        return {"above": self.above.tolist(), "below": self.below.tolist()}


def ratio(numerator: Array, denominator: Array) -> Interval:
    """Return sum(numerator) / sum(denominator) with its interval over prompts."""
    return interval(*jackknife(np.divide, numerator, denominator))


def paired_change(before: Ratio, after: Ratio) -> Interval:
    """Return after - before over the prompts where both are defined."""
    both = (before.below > 0) & (after.below > 0)
    sums = [side[both] for side in (before.above, before.below, after.above, after.below)]

    def change(above: Array, below: Array, above_after: Array, below_after: Array) -> Array:
        return np.asarray(above_after / below_after - above / below)

    return interval(*jackknife(change, *sums))


def jackknife(figure: Callable[..., Array], *summands: Array) -> tuple[Array, Array]:
    """Evaluate a figure on all prompts and without each prompt.

    Args:
        figure: maps the sums of all ``summands``, each [C, ...], to [C, ...] the figure.
        summands: arrays [P, ...] of one summand per prompt.

    Returns:
        [...] the figure of all prompts, and [P, ...] the influence of each prompt: P - 1 times the
        change of the figure when the prompt is added to the others. Empty with a single prompt.
    """
    prompts = len(summands[0])
    sums = [each.sum(0, keepdims=True) for each in summands]
    value = figure(*sums)[0]
    if prompts < 2:
        return value, np.empty((0, *np.shape(value)))
    without = figure(*(total - each for total, each in zip(sums, summands, strict=True)))
    return value, (prompts - 1) * (value - without)


def interval(value: Array, influences: Array) -> Interval:
    """Return a figure with its interval from the [P] influences of :func:`jackknife`. With a single
    prompt, or without variation, the interval is the figure itself."""
    prompts = len(influences)
    deviations = influences - influences.mean() if prompts else influences
    spread = np.sqrt(np.sum(deviations**2) / prompts) if prompts else 0.0
    low = high = mean = float(value)
    if spread > 0:
        error = spread / np.sqrt(prompts - 1)
        skewness = np.mean((deviations / spread) ** 3) / np.sqrt(prompts)
        t = -stdtrit(prompts - 1, 0.025)
        low -= error * max(t, _untransform(t, skewness))
        high -= error * min(-t, _untransform(-t, skewness))
    return Interval(mean, float(low), float(high))


def _untransform(x: float, skewness: float) -> float:
    """Invert the monotone transformation that removes the skewness of a studentized mean.

    Args:
        skewness: skewness of the summands, divided by the square root of their number.
    """
    if abs(skewness) < 1e-8:
        return x
    return float(3 / skewness * (np.cbrt(1 + skewness * (x - skewness / 6)) - 1))
