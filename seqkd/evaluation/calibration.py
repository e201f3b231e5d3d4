"""Whether the student knows where the teacher ends.

Definitions, sources and what each metric hides: docs/evaluation.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from seqkd.evaluation.curves import TokenValues
from seqkd.evaluation.intervals import Interval, ratio

Array = np.ndarray

CERTAIN = 1e-7
"""A probability nearer to 0 or 1 counts as this near in a logarithm: float32 knows no better."""
EDGES = (0.0, 0.001, 0.01, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Of the bins of a reliability table: tenths, the lowest split, since most states are there."""


@dataclass(frozen=True)
class ReliabilityBin:
    """States at which the student gives an end a probability from ``low`` to below ``high``."""

    low: float
    high: float
    """The last bin holds 1 as well."""
    states: int
    predicted: float
    """Mean probability of an end."""
    observed: float
    """Share of the states at which the teacher ended."""


@dataclass(frozen=True)
class EndCalibration:
    """The student's probability of ending at each state of the teacher's text, against whether the
    teacher ended there."""

    states: int
    observed_ends: int
    expected_ends: float
    """Sum of the student's probabilities."""
    excess_ends: Interval
    """(expected - observed) per completion; above 0 the student would end too soon."""
    log_loss: Interval
    """Of the student's probabilities, nats per state."""
    constant_log_loss: float
    """Of the observed share of ends, said at every state: what knowing nothing costs."""
    calibration_error: float
    """Expected calibration error over :data:`EDGES`, 0 to 1."""
    bins: tuple[ReliabilityBin, ...]
    """Those that hold a state."""


def end_calibration(probabilities: TokenValues, ended: Sequence[bool]) -> EndCalibration:
    """Reliability of the end of sequence (Guo et al. 2017 for the table and its error).

    Args:
        probabilities: the student's probability, at each state of the teacher's completions, of any
            token that ends one.
        ended: [N] True where the teacher's completion ended, with its last token.
    """
    rows = [np.asarray(row, float) for row in probabilities.values]
    marks = [_mark(len(row), end) for row, end in zip(rows, ended, strict=True)]
    losses = [_log_loss(row, mark) for row, mark in zip(rows, marks, strict=True)]
    p, y = np.concatenate(rows), np.concatenate(marks)

    def by_prompt(values: Sequence[float]) -> Array:
        return np.bincount(probabilities.prompts, values)

    excess = by_prompt([row.sum() - mark.sum() for row, mark in zip(rows, marks, strict=True)])
    bins = _reliability(p, y)
    return EndCalibration(
        states=len(p),
        observed_ends=int(y.sum()),
        expected_ends=float(p.sum()),
        excess_ends=ratio(excess, by_prompt([1.0] * len(rows))),
        log_loss=ratio(by_prompt([x.sum() for x in losses]), by_prompt([len(x) for x in losses])),
        constant_log_loss=float(_log_loss(np.full(len(p), y.mean()), y).mean()),
        calibration_error=sum(b.states * abs(b.predicted - b.observed) for b in bins) / len(p),
        bins=bins,
    )


def _mark(states: int, end: bool) -> Array:
    """[T] bool, True where the completion ended."""
    mark = np.zeros(states, bool)
    mark[-1] = end
    return mark


def _log_loss(p: Array, y: Array) -> Array:
    p = np.clip(p, CERTAIN, 1 - CERTAIN)
    loss: Array = -np.where(y, np.log(p), np.log1p(-p))
    return loss


def _reliability(p: Array, y: Array) -> tuple[ReliabilityBin, ...]:
    place = np.digitize(p, EDGES[1:-1])
    return tuple(
        ReliabilityBin(low, high, int(here.sum()), float(p[here].mean()), float(y[here].mean()))
        for i, (low, high) in enumerate(pairwise(EDGES))
        if (here := place == i).any()
    )
