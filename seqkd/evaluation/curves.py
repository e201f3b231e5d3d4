"""Curves along completions: accumulated error (exposure bias) and survival of completions.

Definitions, sources and limitations of each metric: docs/evaluation.md. Intervals are over prompts
(:mod:`seqkd.evaluation.intervals`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from seqkd.evaluation.intervals import Interval, interval, jackknife

Array = np.ndarray

FEWEST = 10
"""Minimum number of prompts with a completion of length l for a curve to extend to l; with fewer
prompts, all of them."""


@dataclass(frozen=True)
class TokenValues:
    """One value per token of N completions."""

    values: Sequence[Sequence[float] | Array]
    """[N][T_i] values."""
    prompts: Sequence[int]
    """[N] index of each completion's prompt, from 0."""


@dataclass(frozen=True)
class Lengths:
    """Lengths of N completions."""

    tokens: Sequence[int]
    """[N] number of tokens, at least 1, including the end-of-sequence token."""
    ended: Sequence[bool]
    """[N] True if the completion ended with an end-of-sequence token, False if it was cut."""
    prompts: Sequence[int]
    """[N] index of each completion's prompt, from 0."""


# --- exposure bias


@dataclass(frozen=True)
class ExcessAt:
    """Excess accumulated error at one length, in percent."""

    length: int
    percent: Interval | None
    """None if the student makes no error on the teacher's text."""


@dataclass(frozen=True)
class ExposureBias:
    """Errors of the student on its own text and on the teacher's text (Arora et al. 2022).
    Entry l - 1 of each curve is the value at length l."""

    regret: tuple[float, ...]
    """R(l), nats: sum over steps up to l of the mean error on the student's own text."""
    expected: tuple[float, ...]
    """l eps(l), nats: the same sum on the teacher's text."""
    excess: tuple[float | None, ...]
    """ExAccErr(l) = (R(l) - l eps(l)) / (l eps(l)), percent."""
    student_alive: tuple[int, ...]
    """Number of student completions with a token l, over which the mean at step l is taken."""
    teacher_alive: tuple[int, ...]
    """Number of teacher completions with a token l."""
    at: tuple[ExcessAt, ...]
    """Excess with intervals at lengths 1, 2, 4, ... and the last."""


def exposure_bias(student: TokenValues, teacher: TokenValues) -> ExposureBias:
    """Compute the excess accumulated error by length (arXiv 2204.01171).

    Args:
        student: forward KL(p(.|s) || q(.|s)) at each state of the student's samples, nats.
        teacher: the same at each state of the teacher's samples for the same prompts.

    The mean at a step is over the completions that have this step. The curves end at the last
    length that :data:`FEWEST` prompts reach in both sets.
    """
    prompts = 1 + max(*student.prompts, *teacher.prompts)
    own, own_alive = _by_step(student, prompts)
    other, other_alive = _by_step(teacher, prompts)
    steps = min(_reached(own_alive), _reached(other_alive))
    tables = [table[:, :steps] for table in (own, own_alive, other, other_alive)]

    def curves(
        own: Array, own_alive: Array, other: Array, other_alive: Array
    ) -> tuple[Array, Array, Array]:
        """Map sums over prompts [C, steps] to regret, expected and excess, each [C, steps]."""
        regret = np.cumsum(_quotient(own, own_alive), 1)
        expected = np.cumsum(_quotient(other, other_alive), 1)
        return regret, expected, 100 * _quotient(regret - expected, expected)

    sums = [table.sum(0, keepdims=True) for table in tables]
    regret, expected, excess = (curve[0] for curve in curves(*sums))
    shown = sorted({*(2**i for i in range(steps.bit_length()) if 2**i <= steps), steps})
    intervals = _intervals(lambda *sums: curves(*sums)[2][:, np.array(shown) - 1], *tables)
    return ExposureBias(
        regret=_floats(regret),
        expected=_floats(expected),
        excess=tuple(float(e) if np.isfinite(e) else None for e in excess),
        student_alive=_ints(tables[1].sum(0)),
        teacher_alive=_ints(tables[3].sum(0)),
        at=tuple(ExcessAt(n, i) for n, i in zip(shown, intervals, strict=True)),
    )


# --- ends of completions


@dataclass(frozen=True)
class Survival:
    """Kaplan-Meier estimate of the completion length of one model. Cut completions are censored,
    because their full length is unknown."""

    survival: tuple[float, ...]
    """Entry l: share of completions longer than l tokens, from l = 0."""
    hazard: tuple[float, ...]
    """Entry l - 1: share of the completions with a token l that end with it; 0 if there are no
    such completions."""
    restricted_mean: Interval
    """Mean of min(length, horizon), tokens."""


@dataclass(frozen=True)
class EndComparison:
    """Ends of the student's completions compared with those of the teacher's completions."""

    student: Survival
    teacher: Survival
    horizon: int
    """Number of tokens up to which both curves are known: the token limit, if no completion was
    cut before it."""
    mean_difference: Interval
    """Student's restricted mean minus the teacher's, tokens, paired over prompts."""
    largest_gap: float
    """Largest difference, student's survival minus the teacher's, -1 to 1."""
    largest_gap_at: int
    """Length at the largest difference, tokens."""


def compare_ends(student: Lengths, teacher: Lengths) -> EndComparison:
    """Compute Kaplan-Meier survival curves (Kaplan and Meier 1958), their restricted means and the
    largest gap between them (Kolmogorov-Smirnov), up to the length at which both curves are
    known."""
    prompts = 1 + max(*student.prompts, *teacher.prompts)
    longest = max(*student.tokens, *teacher.tokens)
    horizon = int(min(_known_to(student), _known_to(teacher), longest))
    tables = [_ends(lengths, prompts, horizon) for lengths in (student, teacher)]

    def hazard(events: Array, at_risk: Array) -> Array:
        hazards: Array = np.nan_to_num(_quotient(events, at_risk))
        return hazards

    def means(*sums: Array) -> Array:
        """Map sums over prompts [C, horizon] to [C, 3] restricted means and their difference."""
        pairs = sums[:2], sums[2:]
        student, teacher = (_survival(hazard(*pair))[:, :-1].sum(1) for pair in pairs)
        return np.stack([student, teacher, student - teacher], 1)

    mean, teacher_mean, difference = filter(None, _intervals(means, *chain(*tables)))
    student_hazard, teacher_hazard = (
        hazard(*(table.sum(0, keepdims=True) for table in pair)) for pair in tables
    )
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
    """Means over the completions of each of P prompts."""

    length: tuple[float, ...]
    """[P] mean tokens, including the end-of-sequence token."""
    ended: tuple[float, ...]
    """[P] share of completions that ended with an end-of-sequence token."""


def length_rates(lengths: Lengths) -> LengthRates:
    """Compute length and end rate of each prompt. Raises ValueError if a prompt has no
    completion."""
    counts = np.bincount(lengths.prompts)
    if not counts.all():
        raise ValueError(f"prompt {int(counts.argmin())} of {len(counts)} has no completion")
    tokens = np.bincount(lengths.prompts, np.asarray(lengths.tokens, float)) / counts
    ended = np.bincount(lengths.prompts, np.asarray(lengths.ended, float)) / counts
    return LengthRates(_floats(tokens), _floats(ended))


# --- tables of prompts and steps


def _by_step(tokens: TokenValues, prompts: int) -> tuple[Array, Array]:
    """Return [P, T] sums of the values at each step, and [P, T] numbers of completions with it."""
    longest = max(map(len, tokens.values))
    sums, alive = np.zeros((prompts, longest)), np.zeros((prompts, longest))
    for row, prompt in zip(tokens.values, tokens.prompts, strict=True):
        sums[prompt, : len(row)] += row
        alive[prompt, : len(row)] += 1
    return sums, alive


def _reached(alive: Array) -> int:
    """Return the number of steps that at least :data:`FEWEST` prompts reach."""
    reached = (alive > 0).sum(0)
    return int((reached >= min(FEWEST, reached[0])).sum())


def _ends(lengths: Lengths, prompts: int, horizon: int) -> tuple[Array, Array]:
    """Return [P, horizon] numbers of completions that end with each token, and of completions that
    have it."""
    events, at_risk = np.zeros((prompts, horizon)), np.zeros((prompts, horizon))
    rows = zip(lengths.tokens, lengths.ended, lengths.prompts, strict=True)
    for tokens, ended, prompt in rows:
        at_risk[prompt, :tokens] += 1
        if ended and tokens <= horizon:
            events[prompt, tokens - 1] += 1
    return events, at_risk


def _known_to(lengths: Lengths) -> float:
    """Return the length up to which the survival curve is known: infinite if the longest
    completions were not cut."""
    longest = max(lengths.tokens)
    cut = [not e for n, e in zip(lengths.tokens, lengths.ended, strict=True) if n == longest]
    return longest if any(cut) else math.inf


def _survival(hazard: Array) -> Array:
    """Map [C, T] hazards to [C, T + 1] survival, 1 at length 0."""
    return np.cumprod(np.pad(1 - hazard, ((0, 0), (1, 0)), constant_values=1), 1)


def _quotient(above: Array, below: Array) -> Array:
    """Return above / below, NaN where ``below`` is 0."""
    quotient = np.full(above.shape, np.nan)
    np.divide(above, below, out=quotient, where=below != 0)
    return quotient


# --- intervals


def _intervals(figures: Callable[..., Array], *tables: Array) -> list[Interval | None]:
    """Return K intervals; ``figures`` maps the sums of ``tables`` over prompts, each [C, T], to
    [C, K] figures. A figure that is undefined on all prompts, or without one of them, has None."""
    values, influences = jackknife(figures, *tables)
    return [
        interval(value, each) if np.isfinite([value, *each]).all() else None
        for value, each in zip(values, influences.T, strict=True)
    ]


def _floats(values: Array) -> tuple[float, ...]:
    return tuple(values.tolist())


def _ints(values: Array) -> tuple[int, ...]:
    return tuple(int(value) for value in values)
