"""Measurements and their references."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any


@dataclass
class Row:
    """Quantity that is measured several times, each time together with its reference."""

    section: str
    name: str
    unit: str
    reference_name: str
    limit: float | None = None
    """Upper limit of the ratio, or lower limit if ``higher_is_better``."""
    higher_is_better: bool = False
    values: list[float] = field(default_factory=list)
    references: list[float] = field(default_factory=list)

    def add(self, value: float, reference: float) -> None:
        """Add one repetition."""
        self.values.append(value)
        self.references.append(reference)

    def extend(self, values: Iterable[float], references: Iterable[float]) -> None:
        """Add repetitions that were measured step by step."""
        for value, reference in zip(values, references, strict=True):
            self.add(value, reference)

    @property
    def ratio(self) -> float:
        """Median of the ratios of the pairs. The two values of a pair are measured at about the
        same time."""
        return median(v / r for v, r in zip(self.values, self.references, strict=True))

    @property
    def met(self) -> bool | None:
        """True if the ratio is within its limit, None without a limit."""
        if self.limit is None:
            return None
        return self.ratio >= self.limit if self.higher_is_better else self.ratio <= self.limit

    def to_json(self) -> dict[str, Any]:
        """Return all fields, the medians and the ratio."""
        medians = {"median": median(self.values), "reference_median": median(self.references)}
        return asdict(self) | medians | {"ratio": self.ratio, "met": self.met}


def table(rows: Sequence[Row]) -> str:
    """Render medians and ratios, one line per row."""
    lines = []
    width = max(len(row.name) for row in rows)
    for section in dict.fromkeys(row.section for row in rows):
        lines.append(f"\n{section}")
        for row in (r for r in rows if r.section == section):
            aim = ""
            if row.limit is not None:
                sign = ">=" if row.higher_is_better else "<="
                aim = f"  aim {sign} {row.limit:g}: {'met' if row.met else 'NOT MET'}"
            lines.append(
                f"  {row.name:<{width}}  {median(row.values):>10.4g} {row.unit:<10} against "
                f"{median(row.references):>10.4g}  ratio {row.ratio:>6.3g}{aim}  "
                f"({row.reference_name}; {len(row.values)} values)"
            )
    return "\n".join(lines)
