"""Warning about a student whose completions end elsewhere than the teacher's.

Definition, thresholds and fixes: docs/evaluation.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from seqkd.evaluation.intervals import Interval, Ratio, paired_change

LENGTH = 0.1
"""Smallest relevant difference in mean length, as a share of the teacher's mean length."""
ENDS = 0.1
"""Smallest relevant difference in EOS rate, and in expected ends per completion."""
FEWEST = 10
"""Minimum number of prompts for a warning; with fewer, intervals are unreliable."""
CAUSES = {
    "early": "prompts of another kind than in training, normalization total, or short answers of "
    "the data set",
    "late": "normalization rate, too little training, or training completions that were mostly cut",
}
"""Likely causes of completions that end too early or too late."""


@dataclass(frozen=True)
class Comparison:
    """Figure of the student's and of other completions of the same prompts."""

    student: float
    other: float
    change: Interval
    """Student minus other, paired over prompts."""
    prompts: int
    """Number of prompts where both are defined."""


def compare(student: Ratio, other: Ratio) -> Comparison:
    """Compare a figure over the prompts where both are defined; there must be at least one."""
    both = (student.below > 0) & (other.below > 0)
    own, others = (
        float(side.above[both].sum() / side.below[both].sum()) for side in (student, other)
    )
    return Comparison(own, others, paired_change(other, student), int(both.sum()))


def length_warning(
    length: Comparison,
    ended: Comparison,
    ends: Mapping[str, Any] | None = None,
    references: bool = False,
) -> str | None:
    """Return one sentence if length or EOS rate is significantly and relevantly away from the
    teacher's, else None.

    Args:
        length: mean tokens per completion.
        ended: share of completions that end with an end-of-sequence token.
        ends: :class:`seqkd.evaluation.calibration.EndCalibration` as plain data. It adds to a
            finding. It is a finding of its own only if every completion is cut, because length and
            EOS rate are then equal for every student.
        references: True if the other completions are the data set's answers, not the teacher's.
    """
    if length.prompts < FEWEST:
        return None
    findings = list(_sampled(length, ended, "the references" if references else "the teacher's"))
    if ends is not None and (findings or not (ended.student or ended.other)):
        findings += _expected(ends)
    if not findings:
        return None
    note = "no teacher was measured" if references else "the divergences do not show this"
    return (
        f"{', and '.join(text for _, text in findings)}; {note}; likely causes: "
        f"{CAUSES[findings[0][0]]}; fixes: docs/evaluation.md, Length warning"
    )


def _sampled(length: Comparison, ended: Comparison, others: str) -> Iterator[tuple[str, str]]:
    """Yield the direction and the text of each finding on completions."""
    low, high = length.change.low, length.change.high
    if _deviates(length.change, LENGTH * length.other):
        shorter = length.change.mean < 0
        yield (
            "early" if shorter else "late",
            f"student completions are {abs(length.change.mean):.3g} tokens "
            f"{'shorter' if shorter else 'longer'} than {others} ({length.student:.3g} against "
            f"{length.other:.3g}, 95 % interval of the difference {low:.3g} to {high:.3g})",
        )
    low, high = 100 * ended.change.low, 100 * ended.change.high
    if _deviates(ended.change, ENDS):
        yield (
            "early" if ended.change.mean > 0 else "late",
            f"{100 * ended.student:.3g} % of the student's completions end by themselves against "
            f"{100 * ended.other:.3g} % of {others} (95 % interval of the difference {low:.3g} to "
            f"{high:.3g} percentage points)",
        )


def _expected(ends: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the direction and the text of a finding on the student's end probabilities."""
    excess = Interval(**ends["excess_ends"])
    if _deviates(excess, ENDS):
        yield (
            "early" if excess.mean > 0 else "late",
            f"on the teacher's text the student expects {ends['expected_ends']:.3g} ends where "
            f"there are {ends['observed_ends']} (95 % interval of the difference per completion "
            f"{excess.low:.3g} to {excess.high:.3g})",
        )


def _deviates(change: Interval, tolerance: float) -> bool:
    """Return True if a difference is significant and larger than ``tolerance``."""
    return (change.low > 0 or change.high < 0) and abs(change.mean) > tolerance
