"""Measurements beside what they are measured against."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any


@dataclass
class Row:
    """One quantity, measured several times by turns with what it is compared with."""

    section: str
    what: str
    unit: str
    against: str
    """What the other column is."""
    limit: float | None = None
    """The ratio that is aimed at: at most, or at least where more is better."""
    more_is_better: bool = False
    ours: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)

    def add(self, ours: float, other: float) -> None:
        """One repetition of both."""
        self.ours.append(ours)
        self.others.append(other)

    def pairs(self, ours: Iterable[float], others: Iterable[float]) -> None:
        """What was measured step by step."""
        for pair in zip(ours, others, strict=True):
            self.add(*pair)

    @property
    def ratio(self) -> float:
        """The median of the pairs', both of which are of the same time where that can be."""
        return median(a / b for a, b in zip(self.ours, self.others, strict=True))

    @property
    def met(self) -> bool | None:
        """Whether the aim is; None where there is none."""
        if self.limit is None:
            return None
        return self.ratio >= self.limit if self.more_is_better else self.ratio <= self.limit

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        medians = {"ours_median": median(self.ours), "other_median": median(self.others)}
        return asdict(self) | medians | {"ratio": self.ratio, "met": self.met}


def table(rows: Sequence[Row]) -> str:
    """Medians, and the median ratio, a line each."""
    lines = []
    width = max(len(row.what) for row in rows)
    for section in dict.fromkeys(row.section for row in rows):
        lines.append(f"\n{section}")
        for row in (r for r in rows if r.section == section):
            aim = ""
            if row.limit is not None:
                sign = ">=" if row.more_is_better else "<="
                aim = f"  aim {sign} {row.limit:g}: {'met' if row.met else 'NOT MET'}"
            lines.append(
                f"  {row.what:<{width}}  {median(row.ours):>10.4g} {row.unit:<10} against "
                f"{median(row.others):>10.4g}  ratio {row.ratio:>6.3g}{aim}  "
                f"({row.against}; {len(row.ours)} values)"
            )
    return "\n".join(lines)
