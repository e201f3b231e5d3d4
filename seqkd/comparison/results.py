"""Results of a comparison, as tables and as comparison.json."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from seqkd import console
from seqkd.comparison.plan import Comparison, Entry
from seqkd.comparison.statistics import Estimate, difference, estimate, holm
from seqkd.config.base import BudgetKind
from seqkd.errors import DataError
from seqkd.evaluation import table
from seqkd.evaluation.catalog import labeled
from seqkd.evaluation.heldout import FIGURES, TEACHER_FIGURES, teacher_figure
from seqkd.evaluation.intervals import Ratio
from seqkd.evaluation.tasks import PREFIX, with_tasks
from seqkd.files import atomic_write, disk_errors
from seqkd.storage import run_reader
from seqkd.storage.run_reader import Run

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

KINDS: tuple[BudgetKind, ...] = get_args(BudgetKind)
FIRST = ("reverse_kl_per_token", "forward_kl_per_token", "student_length", "student_eos_rate")
"""Figures shown first: length is always reported with divergence."""
TEACHER, INITIAL = "(teacher)", "(before)"
"""Table rows that are not methods: the teacher and the untrained student of the baseline's runs.
Names of methods have no brackets."""

ByMethod = dict[str, dict[str, Estimate]]
"""Estimates by method and figure."""


@dataclass(frozen=True)
class Tables:
    """Figures on one set of prompts."""

    name: str
    prompts: int
    names: list[str]
    """Figures of any method, in display order."""
    figures: ByMethod
    differences: ByMethod
    """Differences from the baseline, over the seeds of both methods."""
    adjusted: dict[str, dict[str, float]]
    """p-values of the differences by method and figure, Holm-adjusted over the methods."""

    @property
    def tasks(self) -> list[str]:
        """Names of the task accuracies."""
        return [name for name in self.names if name.startswith(PREFIX)]

    def verdict(self, method: str, figure: str) -> str:
        """Return the significance of the difference from the baseline as text, for example
        "lower (p 0.01)"."""
        estimate = self.differences[method][figure]
        if len(estimate.of_seeds) < 2:
            return "one seed: not tested"
        p = self.adjusted[method][figure]
        shown = f"(p {p:.2g})" if p >= 0.001 else "(p < 0.001)"
        if p >= 0.05:
            return f"not significant {shown}"
        return f"{'higher' if estimate.mean > 0 else 'lower'} {shown}"


@dataclass(frozen=True)
class Result:
    """Runs of a comparison, with tables of the finished runs."""

    comparison: Comparison
    entries: Sequence[Entry]
    runs: dict[tuple[str, int], Run]
    """Started runs by method and seed."""
    tables: list[Tables]
    """Tables on the held-out prompts, then on each prompt set of seqkd evaluate."""
    problems: list[str]
    """Incomplete runs and other limitations, one line each."""

    def finished(self, method: str) -> dict[int, Run]:
        """Return the finished runs of one method, by seed."""
        return {s: run for (m, s), run in self.runs.items() if m == method and run.over}

    def spent(self, method: str) -> dict[str, float]:
        """Return mean costs over the finished runs: "steps" and every kind of budget."""
        runs = self.finished(method).values()
        costs = {"steps": [float(run.done) for run in runs]}
        costs |= {kind: [run.spent(kind) for run in runs] for kind in KINDS}
        return {name: sum(values) / len(values) for name, values in costs.items() if values}


def read(comparison: Comparison, entries: Sequence[Entry]) -> Result:
    """Read the results so far. Raises DataError if the runs cannot be compared."""
    started = [e for e in entries if (e.directory / "metrics.jsonl").exists()]
    runs = {(e.method, e.seed): run_reader.read(e.directory) for e in started}
    finished = [e for e in started if runs[e.method, e.seed].over]
    _refuse_other_prompts(finished)
    held: dict[str, dict[int, dict[str, Ratio]]] = {}
    for entry in finished:
        ratios = _per_prompt(runs[entry.method, entry.seed])
        if "main" in ratios:
            main = ratios["main"]
            held.setdefault(entry.method, {})[entry.seed] = main
            if entry.method == comparison.against:
                held.setdefault(INITIAL, {})[entry.seed] = ratios["initial"]
                teacher = {f: main[t] for f in main if (t := teacher_figure(f)) in main}
                held.setdefault(TEACHER, {})[entry.seed] = teacher
    student_figures = [figure for figure in FIGURES if figure not in TEACHER_FIGURES.values()]
    measured = (row for seeds in held.values() for row in seeds.values())
    tasks = [name for name in with_tasks((), *measured) if name.startswith(PREFIX)]
    order = list(dict.fromkeys((*tasks, *FIRST, *student_figures)))
    tables = [_tables("held-out prompts", held, order, comparison)] if held else []
    tables += _evaluated(comparison, finished, runs)
    return Result(comparison, entries, runs, tables, list(_problems(comparison, entries, runs)))


def _tables(
    name: str,
    held: Mapping[str, Mapping[int, Mapping[str, Ratio]]],
    order: Sequence[str],
    comparison: Comparison,
) -> Tables:
    """Estimate all figures and differences from ``held`` (by method, seed and figure)."""
    methods = [m for m in (TEACHER, INITIAL, *comparison.methods) if m in held]
    present = {figure for seeds in held.values() for row in seeds.values() for figure in row}
    names = [figure for figure in order if figure in present]

    def runs(method: str, figure: str) -> dict[int, Ratio]:
        return {s: row[figure] for s, row in held[method].items() if figure in row}

    figures = {
        m: {f: estimate([*seeds.values()]) for f in names if (seeds := runs(m, f))} for m in methods
    }
    differences: ByMethod = {}
    for method in methods:
        if method == comparison.against or comparison.against not in held:
            continue
        for figure in names:
            own, baseline = runs(method, figure), runs(comparison.against, figure)
            if both := [seed for seed in own if seed in baseline]:
                change = difference([own[s] for s in both], [baseline[s] for s in both])
                differences.setdefault(method, {})[figure] = change

    def tested(figure: str) -> dict[str, float]:
        rows = {m: row[figure] for m, row in differences.items() if figure in row}
        return {m: e.p for m, e in rows.items() if m in comparison.methods and len(e.of_seeds) > 1}

    by_figure = {figure: holm(tested(figure)) for figure in names}
    adjusted = {
        m: {f: by_figure[f].get(m, e.p) for f, e in row.items()} for m, row in differences.items()
    }
    ratio = next(r for seeds in held.values() for row in seeds.values() for r in row.values())
    return Tables(name, len(ratio.below), names, figures, differences, adjusted)


def _per_prompt(run: Run) -> dict[str, dict[str, Ratio]]:
    """Return the held-out figures by stage; empty if none were measured."""
    return run.evaluation.per_prompt if run.evaluation else {}


def _evaluated(
    comparison: Comparison, finished: Sequence[Entry], runs: Mapping[tuple[str, int], Run]
) -> Iterator[Tables]:
    """Yield the tables of each prompt set of seqkd evaluate."""
    sets: dict[str, dict[str, dict[int, dict[str, Ratio]]]] = {}
    for entry in finished:
        for prompts, evaluation in runs[entry.method, entry.seed].evaluated.items():
            ratios, held = evaluation.per_prompt, sets.setdefault(prompts, {})
            for name, method in (("teacher", TEACHER), ("initial", INITIAL)):
                if entry.method == comparison.against and name in ratios:
                    held.setdefault(method, {})[entry.seed] = ratios[name]
            if "student" in ratios:
                held.setdefault(entry.method, {})[entry.seed] = ratios["student"]
    for name, held in sets.items():
        if held:
            columns = (row for seeds in held.values() for row in seeds.values())
            yield _tables(name, held, with_tasks(table.FIGURES, *columns), comparison)


def _refuse_other_prompts(finished: Sequence[Entry]) -> None:
    """Raise DataError unless all runs were measured on the same prompts."""
    digests: dict[str, Entry] = {}
    for entry in finished:
        data = json.loads((entry.directory / "data.json").read_text(encoding="utf-8"))
        digests.setdefault(json.dumps(data["held-out"]), entry)
    if len(digests) > 1:
        a, b, *_ = (entry.directory for entry in digests.values())
        raise DataError(
            f"{a} and {b} were measured on different held-out prompts, so they cannot be compared. "
            "Use the same data.heldout_path (or heldout_split, or heldout_fraction), data.system, "
            "data.max_prompt_tokens and evaluation.prompts for all methods."
        )


def _problems(
    comparison: Comparison, entries: Sequence[Entry], runs: Mapping[tuple[str, int], Run]
) -> Iterator[str]:
    budget = comparison.budget
    for entry in entries:
        run = runs.get((entry.method, entry.seed))
        if run is None or not run.over:
            yield f"{entry.method}, seed {entry.seed}: {run.state if run else 'not started'}."
        elif "main" not in _per_prompt(run):
            yield f"{entry.method}, seed {entry.seed}: not measured on held-out prompts."
        elif (spent := run.spent(budget.kind)) < budget.amount:
            yield (
                f"{entry.method}, seed {entry.seed}: the run ended after {spent:g} of "
                f"{budget.amount:g} {budget.kind}."
            )
    warned: dict[tuple[str, str], list[str]] = {}
    for (method, seed), run in runs.items():
        sets: dict[str, Any] = {"held-out prompts": run.over and run.warnings}
        sets |= {name: run.over and other.warnings for name, other in run.evaluated.items()}
        for name in filter(sets.get, sets):
            warned.setdefault((method, name), []).append(str(seed))
    for (method, name), seeds in warned.items():
        yield (
            f"{method}, seed {', '.join(seeds)}: on {name}, length or EOS rate is significantly "
            "away from the teacher's. Figures and fixes are in the report of each run."
        )
    if len(comparison.seeds) < 2:
        yield (
            "There is only one seed: intervals are over prompts only, and differences are not "
            "tested. Set three or more seeds."
        )


def write(result: Result, directory: Path) -> None:
    """Write ``comparison.json``. Raises StorageError if it cannot be written."""
    comparison = result.comparison
    content: dict[str, Any] = {
        "comparison": comparison.model_dump(mode="json"),
        "baseline": comparison.against,
        "interval": "95 %, over seeds and prompts",
        "runs": {
            method: {
                str(seed): {"directory": run.directory.name, "state": run.state, "steps": run.done}
                | {kind: run.spent(kind) for kind in KINDS}
                for (name, seed), run in result.runs.items()
                if name == method
            }
            for method in comparison.methods
        },
        "tables": {
            tables.name: {
                "prompts": tables.prompts,
                "figures": _plain(tables.figures),
                "differences": _plain(tables.differences),
                "p_adjusted": tables.adjusted,
            }
            for tables in result.tables
        },
        "problems": result.problems,
    }
    file = directory / "comparison.json"
    with disk_errors(file):
        atomic_write(file, json.dumps(content, indent=2) + "\n")


def _plain(estimates: ByMethod) -> dict[str, dict[str, dict[str, Any]]]:
    return {m: {figure: asdict(e) for figure, e in row.items()} for m, row in estimates.items()}


def render(result: Result) -> Iterator[RenderableType]:
    """Yield all tables and problems for a terminal."""
    heads = ["mean over seeds", "steps", *(kind.replace("_", " ") for kind in KINDS)]
    spent = {method: result.spent(method) for method in result.comparison.methods}
    costs = [[m, *(f"{v:,.0f}" for v in means.values())] for m, means in spent.items() if means]
    if costs:
        yield console.table(costs, heads)
    for tables in result.tables:
        yield (
            f"\n{tables.name}: {tables.prompts} prompts; mean [95 % interval over seeds and "
            f"prompts], each seed, and the difference from {result.comparison.against}"
        )
        for figure in tables.names:
            yield ""
            yield _figure_table(tables, figure)
    if result.problems:
        yield "\n" + "\n".join(result.problems)


def _figure_table(tables: Tables, figure: str) -> Table:
    rows = []
    for method, estimates in tables.figures.items():
        if (estimate := estimates.get(figure)) is None:
            continue
        from_baseline = tables.differences.get(method, {}).get(figure)
        rows.append(
            [
                f"  {method}",
                shown(estimate),
                " ".join(f"{value:.3g}" for value in estimate.of_seeds),
                shown(from_baseline, "+") if from_baseline else "",
                tables.verdict(method, figure) if from_baseline else "",
            ]
        )
    return console.table(rows, [labeled(figure), "", "", "", ""])


def shown(value: Estimate, sign: str = "") -> str:
    """Return the mean with its interval."""
    return f"{value.mean:{sign}.3g} [{value.low:{sign}.3g}, {value.high:{sign}.3g}]"
