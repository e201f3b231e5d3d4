"""What changes along a completion: errors that pile up, and where it ends.

Definitions, sources and what each metric hides: docs/evaluation.md. Intervals are 95 % percentile
bootstraps over prompts with the same draws as :func:`seqkd.evaluation.intervals.ratio`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from seqkd.evaluation.intervals import Interval, bootstrap

Array = np.ndarray

FEWEST = 10
"""Prompts that must have a completion of some length for a curve to go on to it; all of them where
there are fewer."""


@dataclass(frozen=True)
class TokenValues:
    """A number at each token of N completions."""

    values: Sequence[Sequence[float] | Array]
    """[N][T_i]"""
    prompts: Sequence[int]
    """[N] index of each completion's prompt, from 0."""


@dataclass(frozen=True)
class Lengths:
    """How long N completions are."""

    tokens: Sequence[int]
    """[N] tokens, at least 1, the one that ends it included."""
    ended: Sequence[bool]
    """[N] True where it ended by itself, False where it was cut."""
    prompts: Sequence[int]
    """[N] index of each completion's prompt, from 0."""


# --- exposure bias


@dataclass(frozen=True)
class ExcessAt:
    """Excess accumulated error at one length, in percent."""

    length: int
    percent: Interval | None
    """None where the student makes no error on the teacher's text."""


@dataclass(frozen=True)
class ExposureBias:
    """Errors of the student along its own text and along the teacher's (Arora et al. 2022).
    Entry l - 1 of each curve is that of length l."""

    regret: tuple[float, ...]
    """R(l), nats: sum up to l of the mean error at each step, on the student's own text."""
    expected: tuple[float, ...]
    """l eps(l), nats: the same on the teacher's text."""
    excess: tuple[float | None, ...]
    """ExAccErr(l) = (R(l) - l eps(l)) / (l eps(l)), percent."""
    student_alive: tuple[int, ...]
    """Completions with a token l, which the step's mean is of."""
    teacher_alive: tuple[int, ...]
    at: tuple[ExcessAt, ...]
    """With intervals, at lengths 1, 2, 4, ... and the last."""


def exposure_bias(student: TokenValues, teacher: TokenValues) -> ExposureBias:
    """Excess accumulated error over length (arXiv 2204.01171).

    Args:
        student: forward KL(p(.|s) || q(.|s)) at each state of the student's samples, nats.
        teacher: the same at each state of the teacher's samples on the same prompts.

    A step's mean is over the completions that have it. The curves end at the last length that
    :data:`FEWEST` prompts reach in both.
    """
    prompts = 1 + max(*student.prompts, *teacher.prompts)
    own, own_alive = _by_step(student, prompts)
    other, other_alive = _by_step(teacher, prompts)
    steps = min(_reached(own_alive), _reached(other_alive))
    tables = [table[:, :steps] for table in (own, own_alive, other, other_alive)]

    def curves(weights: Array) -> tuple[Array, Array, Array]:
        """[C, P] -> regret, expected and excess, [C, steps] each."""
        own, own_alive, other, other_alive = (weights @ table for table in tables)
        regret = np.cumsum(_quotient(own, own_alive), 1)
        expected = np.cumsum(_quotient(other, other_alive), 1)
        return regret, expected, 100 * _quotient(regret - expected, expected)

    regret, expected, excess = (curve[0] for curve in curves(np.ones((1, prompts))))
    shown = sorted({*(2**i for i in range(steps.bit_length()) if 2**i <= steps), steps})
    intervals = _intervals(lambda w: curves(w)[2][:, np.array(shown) - 1], prompts)
    return ExposureBias(
        regret=_floats(regret),
        expected=_floats(expected),
        excess=tuple(float(e) if np.isfinite(e) else None for e in excess),
        student_alive=_ints(tables[1].sum(0)),
        teacher_alive=_ints(tables[3].sum(0)),
        at=tuple(ExcessAt(n, i) for n, i in zip(shown, intervals, strict=True)),
    )


# --- where completions end


@dataclass(frozen=True)
class Survival:
    """Kaplan-Meier estimate of how long one model's completions are. Cut completions are
    censored: they would have gone on for an unknown while."""

    survival: tuple[float, ...]
    """Entry l: the share of completions longer than l tokens, from l = 0."""
    hazard: tuple[float, ...]
    """Entry l - 1: the share of those with a token l that end with it; 0 where there is none."""
    restricted_mean: Interval
    """Mean of min(length, horizon), tokens."""


@dataclass(frozen=True)
class EndComparison:
    """When the student's completions end, beside the teacher's."""

    student: Survival
    teacher: Survival
    horizon: int
    """Tokens up to which both curves are known: the limit, if nothing was cut before it."""
    mean_difference: Interval
    """Student's restricted mean minus the teacher's, tokens, paired over prompts."""
    largest_gap: float
    """Student's survival minus the teacher's where they differ most, -1 to 1."""
    largest_gap_at: int
    """The length of that, tokens."""


def compare_ends(student: Lengths, teacher: Lengths) -> EndComparison:
    """Kaplan-Meier survival curves (Kaplan and Meier 1958), their restricted means and the largest
    gap between them (Kolmogorov-Smirnov), up to the length that both curves are known to."""
    prompts = 1 + max(*student.prompts, *teacher.prompts)
    longest = max(*student.tokens, *teacher.tokens)
    horizon = int(min(_known_to(student), _known_to(teacher), longest))
    tables = [_ends(lengths, prompts, horizon) for lengths in (student, teacher)]

    def hazards(weights: Array) -> list[Array]:
        """[C, P] -> [C, horizon] of the student and of the teacher."""
        return [
            np.nan_to_num(_quotient(weights @ events, weights @ at_risk))
            for events, at_risk in tables
        ]

    def means(weights: Array) -> Array:
        student_hazard, teacher_hazard = (
            _survival(hazard)[:, :-1].sum(1) for hazard in hazards(weights)
        )
        return np.stack([student_hazard, teacher_hazard, student_hazard - teacher_hazard], 1)

    mean, teacher_mean, difference = filter(None, _intervals(means, prompts))
    student_hazard, teacher_hazard = hazards(np.ones((1, prompts)))
    gaps = (_survival(student_hazard) - _survival(teacher_hazard))[0]
    at = int(np.abs(gaps).argmax())
    return EndComparison(
        student=Survival(_floats(_survival(student_hazard)[0]), _floats(student_hazard[0]), mean),
        teacher=Survival(
            _floats(_survival(teacher_hazard)[0]), _floats(teacher_hazard[0]), teacher_mean
        ),
        horizon=horizon,
        mean_difference=difference,
        largest_gap=float(gaps[at]),
        largest_gap_at=at,
    )


@dataclass(frozen=True)
class LengthRates:
    """Of each of P prompts, the mean over its completions."""

    length: tuple[float, ...]
    """[P] tokens, the one that ends it included."""
    ended: tuple[float, ...]
    """[P] share that ended by themselves."""


def length_rates(lengths: Lengths) -> LengthRates:
    """Length and end rate of each prompt, which must all have a completion."""
    counts = np.bincount(lengths.prompts)
    if not counts.all():
        raise ValueError(f"prompt {int(counts.argmin())} of {len(counts)} has no completion")
    tokens = np.bincount(lengths.prompts, np.asarray(lengths.tokens, float)) / counts
    ended = np.bincount(lengths.prompts, np.asarray(lengths.ended, float)) / counts
    return LengthRates(_floats(tokens), _floats(ended))


# --- tables of prompts and steps


def _by_step(tokens: TokenValues, prompts: int) -> tuple[Array, Array]:
    """[P, T] sums of the values at each step, and how many completions have it."""
    longest = max(map(len, tokens.values))
    sums, alive = np.zeros((prompts, longest)), np.zeros((prompts, longest))
    for row, prompt in zip(tokens.values, tokens.prompts, strict=True):
        sums[prompt, : len(row)] += row
        alive[prompt, : len(row)] += 1
    return sums, alive


def _reached(alive: Array) -> int:
    """Steps that enough prompts reach."""
    reached = (alive > 0).sum(0)
    return int((reached >= min(FEWEST, reached[0])).sum())


def _ends(lengths: Lengths, prompts: int, horizon: int) -> tuple[Array, Array]:
    """[P, horizon] completions that end with each token, and those that have it."""
    events, at_risk = np.zeros((prompts, horizon)), np.zeros((prompts, horizon))
    rows = zip(lengths.tokens, lengths.ended, lengths.prompts, strict=True)
    for tokens, ended, prompt in rows:
        at_risk[prompt, :tokens] += 1
        if ended and tokens <= horizon:
            events[prompt, tokens - 1] += 1
    return events, at_risk


def _known_to(lengths: Lengths) -> float:
    """The length that the survival curve is known to: without end where the longest ended."""
    longest = max(lengths.tokens)
    cut = [not e for n, e in zip(lengths.tokens, lengths.ended, strict=True) if n == longest]
    return longest if any(cut) else math.inf


def _survival(hazard: Array) -> Array:
    """[C, T] -> [C, T + 1], 1 at length 0."""
    return np.cumprod(np.pad(1 - hazard, ((0, 0), (1, 0)), constant_values=1), 1)


def _quotient(above: Array, below: Array) -> Array:
    """NaN where ``below`` is 0."""
    quotient = np.full(above.shape, np.nan)
    np.divide(above, below, out=quotient, where=below != 0)
    return quotient


# --- bootstrap


def _intervals(figures: Callable[[Array], Array], prompts: int) -> list[Interval | None]:
    """Return K intervals; ``figures`` maps [C, P] weights of the prompts to [C, K]. None where a
    figure is not defined; resamples in which it is not defined are dropped."""
    values, draws = bootstrap(lambda rows: figures(_counts(rows)), prompts)
    return [
        Interval(float(value), *map(float, np.nanpercentile(drawn, (2.5, 97.5))))
        if np.isfinite(value)
        else None
        for value, drawn in zip(values, draws.T, strict=True)
    ]


def _counts(rows: Array) -> Array:
    """Return how often each prompt occurs in each row: [C, P] indices -> [C, P] counts."""
    resamples, prompts = rows.shape
    flat = rows + prompts * np.arange(resamples)[:, None]
    counts = np.bincount(flat.ravel(), minlength=rows.size)
    return counts.reshape(rows.shape).astype(float)


def _floats(values: Array) -> tuple[float, ...]:
    return tuple(values.tolist())


def _ints(values: Array) -> tuple[int, ...]:
    return tuple(int(value) for value in values)
