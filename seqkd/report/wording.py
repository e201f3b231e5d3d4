"""Format of numbers and texts on a page."""

from __future__ import annotations

from seqkd.evaluation.intervals import Interval
from seqkd.evaluation.summary import stage_label


def count(number: float) -> str:
    """Return a number with a narrow space between thousands."""
    return f"{number:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def duration(seconds: float) -> str:
    """Return a duration as text, for example "2 h 5 min", "3 min 4 s" or "12.3 s"."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def change(interval: Interval) -> str:
    """Return a paired change with its direction, or "not significant"."""
    if interval.low > 0 or interval.high < 0:
        return f"{signed(interval)}, {'lower' if interval.high < 0 else 'higher'}"
    return f"{signed(interval)}, not significant"


def signed(interval: Interval) -> str:
    """Return an interval with signs and true minus characters."""
    low, mean, high = (f"{v:+.3g}" for v in (interval.low, interval.mean, interval.high))
    return f"{mean} [{low}, {high}]".replace("-", "\N{MINUS SIGN}")


def between(pair: str) -> str:
    """Return the two measurements of a change, for example "before → after main"."""
    return " → ".join(stage_label(name) for name in pair.split(" -> "))
