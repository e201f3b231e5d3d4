"""Report page of a comparison of methods."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from seqkd.comparison.results import FIRST, INITIAL, KINDS, TEACHER, Result, Tables
from seqkd.comparison.statistics import Estimate
from seqkd.config.lifecycle import BudgetConfig
from seqkd.config.wording import describe_terms, model_names
from seqkd.evaluation.catalog import metric, title
from seqkd.report import page, plots, samples, wording
from seqkd.report.curves import CostAxis
from seqkd.report.page import Table, save
from seqkd.report.svg import Key, Panel

EVALUATED = (*FIRST[:2], "rougeL", "bartscore_f", "length", "ended")
"""Figures of seqkd evaluate that are shown first."""
ARROWS = {"higher": "↑", "lower": "↓"}
"""Marks of a significant difference, by the first word of its verdict."""
OTHERS = {TEACHER: "teacher", INITIAL: "before training"}
"""Labels of the table rows that are not methods."""


@dataclass(frozen=True)
class Row:
    """Row of one method in the table of a figure."""

    head: Key | str
    """Key of the method, or the label of the teacher or the untrained student."""
    estimate: Estimate | None
    difference: Estimate | None
    verdict: str
    arrow: str
    """Mark of a significant difference; empty if it is not significant."""
    baseline: bool


@dataclass(frozen=True)
class Figure:
    """Figure of all methods. Its intervals have a common axis from ``low`` to ``high``."""

    name: str
    first: bool
    """True if the figure is expanded and part of the overview."""
    rows: list[Row]
    low: float
    high: float
    baseline: Estimate | None
    teacher: Estimate | None

    def at(self, value: float) -> float:
        """Return the position of a value on the axis in percent."""
        return round(4 + 92 * (value - self.low) / ((self.high - self.low) or 1), 2)

    @property
    def ticks(self) -> list[float]:
        """Values of the grid lines."""
        from matplotlib.ticker import MaxNLocator

        ticks = MaxNLocator(4).tick_values(self.low, self.high)
        return [float(tick) for tick in ticks if self.low <= tick <= self.high]


def write(result: Result, out: Path) -> None:
    """Write the page. Raises StorageError if it cannot be written."""
    save(render(result, out.parent), out)


def render(result: Result, place: Path) -> str:
    """Return the page; its links are relative to the directory ``place``."""
    comparison, keys = result.comparison, methods(result)
    first = {
        f"{key.label}, seed {seed}": run
        for name, key in keys.items()
        for seed, run in list(result.finished(name).items())[:1]
    }
    entries = result.entries[: len(keys)]
    return page.render(
        "comparison.html",
        title=comparison.name,
        refresh=None,
        result=result,
        comparison=comparison,
        methods=keys,
        losses={entry.method: describe_terms(entry.config) for entry in entries},
        facts=facts(result, keys),
        models=page.shared([model_names(entry.config) for entry in result.entries]),
        notes=list(_notes(result)),
        sections=[(tables, list(figures(tables, result, keys))) for tables in result.tables],
        costs=costs(result, keys),
        quality=dict(_quality(result, keys)),
        examples=samples.side_by_side(first),
        links={
            (entry.method, entry.seed): quote(os.fsencode(os.path.relpath(report, place)))
            for entry in result.entries
            if (report := entry.directory / "report.html").exists()
        },
        differing=page.differing([entry.config for entry in entries], list(keys.values())),
        environment=next((r.environment for r in result.runs.values() if r.environment), None),
    )


def methods(result: Result) -> dict[str, Key]:
    """Return the label and style of each method, in the order of the plan."""
    names = result.comparison.methods
    return {name: Key(index, f"{index + 1}. {name}") for index, name in enumerate(names)}


def facts(result: Result, keys: dict[str, Key]) -> dict[str, str]:
    """Return the budget and the size of the comparison."""
    comparison = result.comparison
    return {
        "Budget of each run": budget(comparison.budget),
        "Methods": str(len(keys)),
        "Seeds": ", ".join(map(str, comparison.seeds)),
        "Baseline": keys[comparison.against].label,
        "Finished runs": f"{sum(r.over for r in result.runs.values())} of {len(result.entries)}",
        "Base configuration": " ".join([comparison.config, *comparison.overrides]),
    }


def budget(config: BudgetConfig) -> str:
    """Return the budget as text, for example "30 000 trained tokens"."""
    if config.kind == "seconds":
        return f"{wording.duration(config.amount)} of training steps"
    return f"{wording.count(config.amount)} {metric(config.kind).label}"


def figures(tables: Tables, result: Result, keys: dict[str, Key]) -> Iterator[Figure]:
    """Yield the figures of one set of prompts; the figures of the overview come first."""
    order = (*tables.tasks, *(FIRST if tables is result.tables[0] else EVALUATED))
    baseline = result.comparison.against
    for name in sorted(tables.names, key=lambda name: name not in order):
        heads: dict[str, Key | str] = {**keys}
        heads |= {row: label for row, label in OTHERS.items() if row in tables.figures}
        estimates = {row: tables.figures.get(row, {}).get(name) for row in (*heads, TEACHER)}
        rows = [_row(tables, row, name, head, row == baseline) for row, head in heads.items()]
        shown = [e for row, e in estimates.items() if e and row != INITIAL]
        ends = [value for e in shown for value in (e.low, e.high, *e.of_seeds)] or [0.0]
        lines = estimates[baseline], estimates[TEACHER]
        yield Figure(name, name in order, rows, min(ends), max(ends), *lines)


def _row(tables: Tables, row: str, figure: str, head: Key | str, baseline: bool) -> Row:
    difference = tables.differences.get(row, {}).get(figure)
    verdict = tables.verdict(row, figure) if difference else ""
    estimate = tables.figures.get(row, {}).get(figure)
    return Row(
        head, estimate, difference, verdict, ARROWS.get(verdict.partition(" ")[0], ""), baseline
    )


def costs(result: Result, keys: dict[str, Key]) -> Table:
    """Return the mean cost of each method in every unit."""
    heads = {kind: "Time in steps" if kind == "seconds" else title(kind) for kind in KINDS}
    heads[result.comparison.budget.kind] += " (the budget)"
    rows = [
        [key]
        + [
            wording.duration(value) if kind == "seconds" else wording.count(value)
            for kind, value in result.spent(name).items()
        ]
        for name, key in keys.items()
    ]
    return Table("Cost", ["Method", "Optimizer steps", *heads.values()], rows)


def _quality(result: Result, keys: dict[str, Key]) -> Iterator[tuple[str, list[Panel]]]:
    """Yield plots of the first figures against every cost, the kind of the budget first."""
    kind = result.comparison.budget.kind
    first = (*(result.tables[0].tasks if result.tables else ()), *FIRST)
    runs = {key: list(result.finished(name).values()) for name, key in keys.items()}
    axes: list[CostAxis] = [kind, "steps", *(k for k in KINDS if k not in (kind, "prompts"))]
    for on in axes:
        if on != "steps" and not any(run.spent(on) for run in result.runs.values()):
            continue
        if panels := [panel for name in first if (panel := plots.cost_panel(name, runs, on))]:
            yield plots.axis_title(on), panels


def _notes(result: Result) -> Iterator[str]:
    over = sum(run.over for run in result.runs.values())
    if over < len(result.entries):
        yield f"{over} of {len(result.entries)} runs are finished. Figures are of finished runs."
    yield from result.problems
    baseline = result.comparison.against
    if not result.finished(baseline):
        yield f"No run of the baseline {baseline} is finished, so there are no differences yet."
    for run in result.runs.values():
        yield from (f"{run.name}: {problem}" for problem in run.problems)
