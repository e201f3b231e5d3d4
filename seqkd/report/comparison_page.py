"""The page of a comparison: what stands in it, for the template."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from seqkd.comparison.plan import Entry
from seqkd.comparison.results import FIRST, INITIAL, KINDS, TEACHER, Result, Tables
from seqkd.comparison.statistics import Estimate
from seqkd.config.lifecycle import BudgetConfig
from seqkd.evaluation.intervals import Interval
from seqkd.report import comparison_plots, samples, tables, wording
from seqkd.report.comparison_plots import Mark
from seqkd.report.curves import Axis
from seqkd.report.panels import Panel
from seqkd.report.plots import AXES
from seqkd.report.run_page import save, template
from seqkd.report.svg import SERIES

OF_EVALUATION = (*FIRST[:2], "rougeL", "bartscore_f", "length", "ended")
"""What is shown first of what seqkd evaluate has measured."""
BESIDE = {figure: teacher for figure, teacher, *_ in tables.HEADLINES}
"""The teacher's figure beside the student's."""
ARROWS = {"higher": "↑", "lower": "↓"}
"""Beside the first word of a verdict that there is a difference."""


@dataclass(frozen=True)
class Method:
    """What a method is, and what it is called in the plots."""

    index: int
    name: str
    arguments: str
    learns: str
    """What its main phase minimises, in words."""
    over: int
    """Seeds whose run is over."""

    @property
    def number(self) -> int:
        """As it is shown."""
        return self.index + 1

    @property
    def colour(self) -> str:
        """A variable of the style sheet."""
        return f"series-{self.index % SERIES + 1}"

    @property
    def line(self) -> int:
        """Class of the style sheet: how its line is drawn."""
        return comparison_plots.line(self.index) + 1


@dataclass(frozen=True)
class Row:
    """One method's part of a figure's table."""

    name: str
    method: Method | None
    """None of the teacher, and of the students before."""
    of: Estimate | None
    difference: str
    verdict: str
    arrow: str
    """Empty where no difference is shown."""


@dataclass(frozen=True)
class Figure:
    """One figure of all methods."""

    title: str
    unit: str
    rows: list[Row]
    plot: Panel | None
    said: list[str]
    """Who is lower, who is higher, who is not told apart."""


@dataclass(frozen=True)
class Section:
    """The figures on one set of prompts."""

    name: str
    prompts: int
    first: list[Figure]
    other: list[Figure]


def write(result: Result, out: Path) -> None:
    """Write the page. StorageError where it cannot be written."""
    save(render(result, out.parent), out)


def render(result: Result, place: Path) -> str:
    """HTML; links are relative to the directory ``place``."""
    comparison = result.comparison
    known = list(methods(result))
    by_name = {method.name: method for method in known}
    examples = {
        f"{method.number}. {method.name}, seed {seed}": run
        for method in known
        for seed, run in list(result.of(method.name).items())[:1]
    }
    shown = samples.across(examples)
    return template("comparison.html").render(
        title=comparison.name,
        refresh=None,
        written=datetime.now(UTC),
        comparison=comparison,
        facts=facts(result, known),
        models=_shared([wording.models(entry.config) for entry in result.entries]),
        methods=known,
        notes=list(_notes(result)),
        sections=[section(of, number, result, by_name) for number, of in enumerate(result.tables)],
        spent=[(method, costs(result, method.name)) for method in known],
        kinds=KINDS,
        quality=list(quality(result, known)),
        samples=shown,
        legend=samples.legend() if samples.coloured(list(examples.values())) else [],
        differing=tables.differing([entry.config for entry in _first_seed(result)]),
        reports=[(m, [_link(result, m.name, s, place) for s in comparison.seeds]) for m in known],
        environment=next((of.environment for of in result.runs.values() if of.environment), None),
    )


def facts(result: Result, known: Sequence[Method]) -> dict[str, str]:
    """Of the whole comparison."""
    comparison = result.comparison
    baseline = next(m for m in known if m.name == comparison.against)
    return {
        "Budget of each run": budget(comparison.budget),
        "Methods": str(len(known)),
        "Seeds": ", ".join(map(str, comparison.seeds)),
        "Baseline": f"{baseline.number}. {baseline.name}",
        "Runs that are over": f"{sum(m.over for m in known)} of {len(result.entries)}",
        "Base configuration": comparison.config,
    }


def budget(of: BudgetConfig) -> str:
    """In words, e.g. "30 000 completion tokens learnt from"."""
    if of.kind == "seconds":
        return f"{wording.duration(of.amount)} of training steps"
    return f"{wording.count(of.amount)} {AXES[of.kind]}"


def costs(result: Result, method: str) -> list[str]:
    """Means over its runs: steps, then every kind of budget; empty before the first is over."""
    of = result.spent(method)
    return [wording.duration(v) if k == "seconds" else wording.count(v) for k, v in of.items()]


def section(of: Tables, number: int, result: Result, known: dict[str, Method]) -> Section:
    """``number`` tells its plots from those of others."""
    first = [f for f in (OF_EVALUATION if number else FIRST) if f in of.labels]

    def made(figures: Sequence[str]) -> list[Figure]:
        return [_figure(of, figure, number, result, known) for figure in figures]

    return Section(of.name, of.prompts, made(first), made([f for f in of.labels if f not in first]))


def _figure(of: Tables, key: str, number: int, result: Result, known: dict[str, Method]) -> Figure:
    title, unit = _titled(of.labels[key])
    rows = [_row(of, key, name, known) for name in (*known, *set_apart(of))]
    marks = [
        Mark(row.method.index, row.name, row.of, bool(row.arrow)) for row in rows if row.method
    ]
    against = result.comparison.against
    name = f"forest-{number}-{key}".replace("_", "-")
    plotted = comparison_plots.forest(name, title, unit, marks, against, _teacher(of, key))
    return Figure(title, unit, rows, plotted, list(_said(rows, known[against])))


def set_apart(of: Tables) -> list[str]:
    """Rows that are of no method."""
    return [name for name in (TEACHER, INITIAL) if name in of.figures]


def _row(of: Tables, key: str, name: str, known: dict[str, Method]) -> Row:
    found = of.figures.get(name, {}).get(key)
    difference = of.differences.get(name, {}).get(key)
    verdict = of.verdict(name, key) if difference else ""
    return Row(
        {TEACHER: "the teacher", INITIAL: "before training"}.get(name, name),
        known.get(name),
        found,
        wording.signed(Interval(difference.mean, difference.low, difference.high))
        if difference
        else "",
        verdict,
        ARROWS.get(verdict.partition(" ")[0], ""),
    )


def _teacher(of: Tables, key: str) -> float | None:
    found = of.figures.get(TEACHER, {}).get(key)
    return found.mean if found else None


def _said(rows: Sequence[Row], baseline: Method) -> Iterator[str]:
    """Whether there are differences between methods, a line for each answer."""
    heads = {"lower": "Lower than", "higher": "Higher than", "not": "Not told apart from"}
    for word, head in heads.items():
        found = [
            f"{row.method.number}.\N{NO-BREAK SPACE}{row.name}"
            for row in rows
            if row.method and row.verdict.split(" ")[0] == word
        ]
        if found:
            yield f"{head} {baseline.number}. {baseline.name}: {', '.join(found)}."


def quality(result: Result, known: Sequence[Method]) -> Iterator[tuple[str, list[Panel]]]:
    """The first figures against everything that they cost, the budget first: what, and plots."""
    kind = result.comparison.budget.kind
    axes: list[Axis] = [kind, *(a for a in AXES if a not in (kind, "prompts"))]
    runs = {m.index: (m.name, list(result.of(m.name).values())) for m in known}
    every = [run for _, of in runs.values() for run in of]
    labels = result.tables[0].labels if result.tables else {}
    for on in axes:
        if on != "steps" and not any(run.spent(on) for run in every):
            continue
        panels = []
        for figure in FIRST:
            name = f"{figure}-{on}".replace("_", "-")
            title, unit = _titled(labels.get(figure, figure))
            teacher = BESIDE.get(figure, "")
            made = comparison_plots.against_cost(name, title, unit, figure, runs, on, teacher)
            panels += [made] if made else []
        if panels:
            yield AXES[on], panels


def methods(result: Result) -> Iterator[Method]:
    """In the order of their numbers."""
    for index, entry in enumerate(_first_seed(result)):
        yield Method(
            index,
            entry.method,
            " ".join(result.comparison.methods[entry.method]),
            " + ".join(wording.objective(term) for term in entry.config.terms),
            len(result.of(entry.method)),
        )


def _first_seed(result: Result) -> Sequence[Entry]:
    """One entry a method, in their order."""
    return result.entries[: len(result.comparison.methods)]


def _notes(result: Result) -> Iterator[str]:
    over = sum(run.over for run in result.runs.values())
    if over < len(result.entries):
        yield f"{over} of {len(result.entries)} runs are over: all figures here are of those."
    yield from result.problems
    if not result.of(result.comparison.against):
        yield (
            f"No run of the baseline, {result.comparison.against}, is over yet: there is nothing "
            "to compare with."
        )
    for run in result.runs.values():
        yield from (f"{run.name}: {problem}" for problem in run.problems)


def _link(result: Result, method: str, seed: int, place: Path) -> dict[str, Any]:
    """To the page of one run, where there is one."""
    entry = next(e for e in result.entries if (e.method, e.seed) == (method, seed))
    run = result.runs.get((method, seed))
    page = entry.directory / "report.html"
    return {
        "href": quote(os.path.relpath(page, place)) if page.exists() else None,
        "state": run.state if run else "not begun",
        "steps": run.done if run else None,
    }


def _titled(label: str) -> tuple[str, str]:
    """Title and unit of a label such as "length (tokens)"."""
    found = re.fullmatch(r"(.*?)(?: \((.*)\))?", label)
    assert found is not None
    return found[1][:1].upper() + found[1][1:], found[2] or ""


def _shared(values: Sequence[Any]) -> Any:
    return values[0] if all(value == values[0] for value in values) else None
