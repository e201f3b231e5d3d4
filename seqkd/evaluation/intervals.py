"""Bootstrap intervals over prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
CHUNK = 500
"""Number of resamples that are evaluated at once."""

Array = np.ndarray


@dataclass(frozen=True)
class Interval:
    """Mean with its 95 % bootstrap interval over prompts."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3g} [{self.low:.3g}, {self.high:.3g}]"

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
        """Return the quotient with a percentile bootstrap over prompts."""
        defined = self.below > 0
        return ratio(self.above[defined], self.below[defined])

    def plain(self) -> dict[str, list[float]]:
        """Return the sums as plain data for JSON."""
        return {"above": self.above.tolist(), "below": self.below.tolist()}


def ratio(numerator: Array, denominator: Array) -> Interval:
    """Return sum(numerator) / sum(denominator) with a percentile bootstrap over prompts."""

    def quotient(rows: Array) -> Array:
        return np.asarray(numerator[rows].sum(1) / denominator[rows].sum(1))

    return _interval(*bootstrap(quotient, len(numerator)))


def paired_change(before: Ratio, after: Ratio) -> Interval:
    """Return after - before over the prompts where both are defined, with paired resampling."""
    both = (before.below > 0) & (after.below > 0)
    sums = [side[both] for side in (before.above, before.below, after.above, after.below)]

    def change(rows: Array) -> Array:
        above, below, above_after, below_after = (side[rows].sum(1) for side in sums)
        return np.asarray(above_after / below_after - above / below)

    return _interval(*bootstrap(change, int(both.sum())))


def bootstrap(statistic: Callable[[Array], Array], prompts: int) -> tuple[Array, Array]:
    """Evaluate a statistic on all prompts and on resamples of them. The resamples are the same at
    every call.

    Args:
        statistic: maps [C, P] prompt indices to [C, ...] the statistic of each row of indices.

    Returns:
        [...] the statistic of all prompts, and [RESAMPLES, ...] the statistics of the resamples.
    """
    picks = np.random.default_rng(0).integers(0, prompts, (RESAMPLES, prompts))
    draws = [statistic(picks[low : low + CHUNK]) for low in range(0, RESAMPLES, CHUNK)]
    return statistic(np.arange(prompts)[None])[0], np.concatenate(draws)


def _interval(value: Array, draws: Array) -> Interval:
    low, high = np.percentile(draws, (2.5, 97.5))
    return Interval(float(value), float(low), float(high))
