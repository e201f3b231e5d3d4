"""Bootstrap intervals over prompts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000


Array = np.ndarray


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % bootstrap interval over prompts."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3g} [{self.low:.3g}, {self.high:.3g}]"

    @property
    def verdict(self) -> str:
        """Of a difference: whether it can be told from none."""
        return "excludes 0" if self.low > 0 or self.high < 0 else "includes 0"


@dataclass(frozen=True)
class Ratio:
    """A figure as the quotient of two sums over prompts."""

    above: Array
    """[P]"""
    below: Array
    """[P] 0 at prompts where the figure is not defined, which are left out."""

    def interval(self) -> Interval:
        """With a percentile bootstrap over prompts."""
        defined = self.below > 0
        return ratio(self.above[defined], self.below[defined])

    def plain(self) -> dict[str, list[float]]:
        """As JSON has it."""
        return {"above": self.above.tolist(), "below": self.below.tolist()}


def ratio(numerator: Array, denominator: Array) -> Interval:
    """sum(numerator) / sum(denominator) with a percentile bootstrap over prompts."""
    picks = _picks(len(numerator))
    means = numerator[picks].sum(1) / denominator[picks].sum(1)
    low, high = np.percentile(means, (2.5, 97.5))
    return Interval(float(numerator.sum() / denominator.sum()), float(low), float(high))


def paired_change(before: Ratio, after: Ratio) -> Interval:
    """Change of a figure, prompts resampled together in both, of those where both define it."""
    defined = (before.below > 0) & (after.below > 0)
    everything = np.arange(defined.sum())

    def value(sums: Ratio, rows: Array) -> Array:
        return np.asarray(sums.above[defined][rows].sum(-1) / sums.below[defined][rows].sum(-1))

    picks = _picks(len(everything))
    low, high = np.percentile(value(after, picks) - value(before, picks), (2.5, 97.5))
    change = value(after, everything) - value(before, everything)
    return Interval(float(change), float(low), float(high))


def _picks(prompts: int) -> Array:
    return np.random.default_rng(0).integers(0, prompts, (RESAMPLES, prompts))
