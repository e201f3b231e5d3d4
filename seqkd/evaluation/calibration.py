"""Calibration of the student's end-of-sequence probability on the teacher's text.

Definitions, sources and limitations of each metric: docs/evaluation.md.
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
"""Probabilities are clipped to [CERTAIN, 1 - CERTAIN] before a logarithm: the precision of
float32."""
EDGES = (0.0, 0.001, 0.01, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Edges of the bins of a reliability table: tenths, with the lowest split further, because most
states are in it."""


@dataclass(frozen=True)
class ReliabilityBin:
    """States at which the student's end probability is in [``low``, ``high``)."""

    low: float
    high: float
    """Upper edge; the last bin includes 1."""
    states: int
    predicted: float
    """Mean end probability of the student."""
    observed: float
    """Share of the states at which the teacher's completion ended."""


@dataclass(frozen=True)
class EndCalibration:
    """Student's end probability at each state of the teacher's text, compared with the ends of the
    teacher's completions."""

    states: int
    observed_ends: int
    expected_ends: float
    """Sum of the student's end probabilities."""
    excess_ends: Interval
    """(expected - observed) per completion; above 0 the student would end too early."""
    log_loss: Interval
    """Log loss of the student's end probabilities, nats per state."""
    constant_log_loss: float
    """Log loss of a constant prediction, the observed share of ends, nats per state: the
    baseline."""
    calibration_error: float
    """Expected calibration error over :data:`EDGES`, 0 to 1."""
    bins: tuple[ReliabilityBin, ...]
    """Non-empty bins."""


def end_calibration(probabilities: TokenValues, ended: Sequence[bool]) -> EndCalibration:
    """Compute the calibration of the end of sequence (Guo et al. 2017 for the reliability table
    and the calibration error).

    Args:
        probabilities: the student's probability of any end-of-sequence token at each state of the
            teacher's completions.
        ended: [N] True if the teacher's completion ended with its last token.
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
    """Return [T] bool, True at the state where the completion ended."""
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
