"""Simulate the coverage of the intervals. For means over seeds and prompts (``seqkd compare``), the
critical values of Cochran and Cox are compared with those of Welch and Satterthwaite; for ratios
over prompts, the jackknife with the percentile bootstrap. Takes about 3 minutes on one core."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator

import numpy as np
from scipy.special import stdtr

from seqkd.comparison.statistics import critical_value
from seqkd.evaluation.intervals import ratio

PROMPTS = 64
LEVELS = (0.05, 0.01, 0.001)
RESAMPLES = 1000

Cases = tuple[np.ndarray, np.ndarray]
"""Numerators and denominators, each [number, prompts]."""


def main(argv: list[str] | None = None) -> int:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tests", type=int, default=400_000, help="simulated comparisons per row")
    parser.add_argument("--ratios", type=int, default=10_000, help="simulated intervals per row")
    args = parser.parse_args(argv)
    show_seeds(args.tests)
    show_ratios(args.ratios)
    return 0


def show_seeds(number: int) -> None:
    """Print how often p is below each level although the expected mean is 0, for normal figures
    without interaction of runs and prompts, which is the least favorable case."""
    print(
        f"Means over S seeds and {PROMPTS} prompts, {number} comparisons without a difference;\n"
        "share: of the variance that is between seeds\n"
    )
    heads = "".join(f"{f'p < {level:g}':>11}" for level in LEVELS)
    head = f"{'share':>6}{'S':>3}"
    print(f"{'':9}{'Welch and Satterthwaite':^44}{'Cochran and Cox':^44}")
    print(head + 2 * f"{'coverage':>11}{heads}")
    rng = np.random.default_rng(0)
    for share in (0.0, 0.1, 0.5, 0.9, 0.97, 1.0):
        for seeds in (3, 4, 5):
            means = rng.normal(0, 1, number)
            parts = [
                (variance * rng.chisquare(freedom, number) / freedom, freedom)
                for variance, freedom in ((1 - share, PROMPTS - 1), (share, seeds - 1))
                if variance
            ]
            rates = [*satterthwaite(means, parts), *cochran_cox(means, parts)]
            print(f"{share:>6}{seeds:>3}", end="")
            for rows in (rates[:3], rates[3:]):
                print(f"{1 - rows[0]:>11.4f}" + "".join(f"{rate:>11.4f}" for rate in rows), end="")
            print()


def satterthwaite(means: np.ndarray, parts: list[tuple[np.ndarray, int]]) -> Iterator[float]:
    """Yield the share of p-values below each level."""
    variance = sum(part for part, _ in parts)
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts)
    p = 2 * stdtr(freedom, -np.abs(means) / np.sqrt(variance))
    return (float(np.mean(p < level)) for level in LEVELS)


def cochran_cox(means: np.ndarray, parts: list[tuple[np.ndarray, int]]) -> Iterator[float]:
    """Yield the share of p-values below each level."""
    statistics = np.abs(means) / np.sqrt(sum(part for part, _ in parts))
    return (float(np.mean(statistics > critical_value(level, parts))) for level in LEVELS)


def lengths(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Draw lengths of completions that are cut at 48 tokens."""
    return np.minimum(rng.geometric(1 / 30, shape), 48).astype(float)


def kl_per_token(rng: np.random.Generator, shape: tuple[int, int]) -> Cases:
    """Draw completions whose tokens cost 0.85 nats on average."""
    tokens = lengths(rng, shape)
    return rng.gamma(tokens * 0.5, 1.7), tokens


def kl_per_sequence(rng: np.random.Generator, shape: tuple[int, int]) -> Cases:
    """Draw the same completions, divided by their number."""
    costs, _ = kl_per_token(rng, shape)
    return costs, np.ones(shape)


def kl_of_unequal_prompts(rng: np.random.Generator, shape: tuple[int, int]) -> Cases:
    """Draw completions of prompts whose costs per token differ."""
    costs, tokens = kl_per_token(rng, shape)
    return costs * rng.gamma(8, 1 / 8, shape), tokens


def skewed_mean(rng: np.random.Generator, shape: tuple[int, int]) -> Cases:
    """Draw exponential values."""
    return rng.exponential(1, shape), np.ones(shape)


def share_of_ended(rng: np.random.Generator, shape: tuple[int, int]) -> Cases:
    """Draw whether completions ended."""
    return (rng.random(shape) < 0.7).astype(float), np.ones(shape)


FIGURES: dict[str, Callable[[np.random.Generator, tuple[int, int]], Cases]] = {
    "KL per token": kl_per_token,
    "KL per sequence": kl_per_sequence,
    "KL per token, unequal prompts": kl_of_unequal_prompts,
    "mean of exponential values": skewed_mean,
    "share of 0.7": share_of_ended,
}


def show_ratios(number: int) -> None:
    """Print the coverage and the mean width of the intervals of several figures."""
    print(f"\nRatios over prompts, {number} samples of prompts; coverage (mean width)\n")
    print(f"{'':31}{'prompts':>8}{'percentile bootstrap':>22}{'jackknife':>18}")
    for prompts in (24, 64):
        for name, draw in FIGURES.items():
            rng = np.random.default_rng(1)
            above, below = draw(rng, (number, prompts))
            many = draw(rng, (4000, 1000))
            expected = many[0].sum() / many[1].sum()
            new = np.array([(i.low, i.high) for i in map(ratio, above, below)])
            cells = []
            for bounds in (percentiles(rng, above, below), new):
                covered = (bounds[:, 0] <= expected) & (expected <= bounds[:, 1])
                cells.append(f"{covered.mean():.4f} ({(bounds[:, 1] - bounds[:, 0]).mean():.3f})")
            print(f"{name:31}{prompts:>8}{cells[0]:>22}{cells[1]:>18}")


def percentiles(rng: np.random.Generator, above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Return [number, 2] the bounds of the percentile bootstrap."""
    prompts = above.shape[1]
    bounds = []
    for a, b in zip(above, below, strict=True):
        counts = rng.multinomial(prompts, np.full(prompts, 1 / prompts), RESAMPLES)
        bounds.append(np.percentile(counts @ a / (counts @ b), (2.5, 97.5)))
    return np.array(bounds)


if __name__ == "__main__":
    sys.exit(main())
