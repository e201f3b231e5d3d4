"""What the runs of a comparison have come to, as tables and as comparison.json."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from seqkd.comparison.plan import Comparison, Entry
from seqkd.comparison.statistics import Estimate, difference, estimate, holm
from seqkd.config.base import BudgetKind
from seqkd.errors import DataError
from seqkd.evaluation import summary, table
from seqkd.evaluation.intervals import Ratio
from seqkd.files import atomic_write, disk_errors
from seqkd.storage import run_reader
from seqkd.storage.run_reader import Run

KINDS: tuple[BudgetKind, ...] = get_args(BudgetKind)
FIRST = ("reverse_kl_per_token", "forward_kl_per_token", "student_length", "student_eos_rate")
"""Figures that are shown first: a divergence is not to be read without the length beside it."""
OF_TEACHER = {"teacher_length": "student_length", "teacher_eos_rate": "student_eos_rate"}
"""Figures of the teacher's completions, which no method changes, and those of the student's with
which they share a table."""
LABELS = {
    name: label.replace(", student", "")
    for name, label in ({name: summary.LABELS[name] for name in FIRST} | summary.LABELS).items()
    if name not in OF_TEACHER
}
TEACHER, INITIAL = "(teacher)", "(before)"
"""In place of a method, whose name has no brackets: the teacher of the baseline's runs, and the
students that they began with."""

ByMethod = dict[str, dict[str, Estimate]]
"""By method, by figure."""


@dataclass(frozen=True)
class Tables:
    """Figures on one set of prompts."""

    name: str
    prompts: int
    labels: dict[str, str]
    """Of every figure that any method has, in the order in which they are shown."""
    figures: ByMethod
    differences: ByMethod
    """From the baseline, over the seeds that both have."""
    adjusted: dict[str, dict[str, float]]
    """By method, by figure: p of the difference, by Holm over the methods."""

    def verdict(self, method: str, figure: str) -> str:
        """Whether there is a difference from the baseline, in words."""
        of = self.differences[method][figure]
        if len(of.of_seeds) < 2:
            return "one seed: not tested"
        p = self.adjusted[method][figure]
        shown = f"(p {p:.2g})" if p >= 0.001 else "(p < 0.001)"
        if p >= 0.05:
            return f"not told apart {shown}"
        return f"{'higher' if of.mean > 0 else 'lower'} {shown}"


@dataclass(frozen=True)
class Result:
    """A comparison as far as it has come."""

    comparison: Comparison
    entries: Sequence[Entry]
    runs: dict[tuple[str, int], Run]
    """By method and seed, of those that have begun."""
    tables: list[Tables]
    """On the held-out prompts; then, where asked for, by seqkd evaluate."""
    problems: list[str]
    """Why a comparison is less than it looks, a line each."""

    def of(self, method: str) -> dict[int, Run]:
        """The runs of one method that are over, by seed."""
        return {s: run for (m, s), run in self.runs.items() if m == method and run.over}

    def spent(self, method: str) -> dict[str, float]:
        """Mean over the runs that are over: "steps", and every kind of budget."""
        runs = self.of(method).values()
        found = {"steps": [float(run.done) for run in runs]}
        found |= {kind: [run.spent(kind) for run in runs] for kind in KINDS}
        return {name: sum(of) / len(of) for name, of in found.items() if of}


def read(comparison: Comparison, entries: Sequence[Entry]) -> Result:
    """What is there by now. DataError where the runs cannot be compared."""
    begun = [e for e in entries if (e.directory / "metrics.jsonl").exists()]
    runs = {(e.method, e.seed): run_reader.read(e.directory) for e in begun}
    over = [e for e in begun if runs[e.method, e.seed].over]
    _refuse_other_prompts(over)
    held: dict[str, dict[int, dict[str, Ratio]]] = {}
    for entry in over:
        found = _per_prompt(runs[entry.method, entry.seed])
        if "main" in found:
            main = found["main"]
            held.setdefault(entry.method, {})[entry.seed] = main
            if entry.method == comparison.against:
                held.setdefault(INITIAL, {})[entry.seed] = found["initial"]
                of_teacher = {of: main[name] for name, of in OF_TEACHER.items() if name in main}
                held.setdefault(TEACHER, {})[entry.seed] = of_teacher
    tables = [_tables("held-out prompts", held, LABELS, comparison)] if held else []
    tables += _evaluated(comparison, over, runs)
    return Result(comparison, entries, runs, tables, list(_problems(comparison, entries, runs)))


def _tables(
    name: str,
    held: Mapping[str, Mapping[int, Mapping[str, Ratio]]],
    labels: Mapping[str, str],
    comparison: Comparison,
) -> Tables:
    """``held``: by method, by seed, by figure."""
    order = [m for m in (TEACHER, INITIAL, *comparison.methods) if m in held]
    of_all = {figure for seeds in held.values() for of in seeds.values() for figure in of}
    known = {figure: label for figure, label in labels.items() if figure in of_all}

    def runs(method: str, figure: str) -> dict[int, Ratio]:
        return {s: of[figure] for s, of in held[method].items() if figure in of}

    figures = {m: {f: estimate([*r.values()]) for f in known if (r := runs(m, f))} for m in order}
    differences: ByMethod = {}
    for method in order:
        if method == comparison.against or comparison.against not in held:
            continue
        for figure in known:
            ours, theirs = runs(method, figure), runs(comparison.against, figure)
            if both := [seed for seed in ours if seed in theirs]:
                found = difference([ours[s] for s in both], [theirs[s] for s in both])
                differences.setdefault(method, {})[figure] = found

    def tested(figure: str) -> dict[str, float]:
        found = {m: of[figure] for m, of in differences.items() if figure in of}
        return {
            m: of.p for m, of in found.items() if m in comparison.methods and len(of.of_seeds) > 1
        }

    by_figure = {figure: holm(tested(figure)) for figure in known}
    adjusted = {
        m: {f: by_figure[f].get(m, of.p) for f, of in differences[m].items()} for m in differences
    }
    ratio = next(of for seeds in held.values() for row in seeds.values() for of in row.values())
    return Tables(name, len(ratio.below), known, figures, differences, adjusted)


def _per_prompt(run: Run) -> dict[str, dict[str, Ratio]]:
    """Held-out figures by stage; nothing where none were measured."""
    return run.evaluation.per_prompt if run.evaluation else {}


def _evaluated(
    comparison: Comparison, over: Sequence[Entry], runs: Mapping[tuple[str, int], Run]
) -> Iterator[Tables]:
    """What seqkd evaluate has measured, of each set of prompts."""
    sets: dict[str, dict[str, dict[int, dict[str, Ratio]]]] = {}
    for entry in over:
        for prompts, evaluation in runs[entry.method, entry.seed].evaluated.items():
            found, of = evaluation.per_prompt, sets.setdefault(prompts, {})
            for name, method in (("teacher", TEACHER), ("initial", INITIAL)):
                if entry.method == comparison.against and name in found:
                    of.setdefault(method, {})[entry.seed] = found[name]
            if "student" in found:
                of.setdefault(entry.method, {})[entry.seed] = found["student"]
    for name, held in sets.items():
        if held:
            yield _tables(name, held, table.LABELS, comparison)


def _refuse_other_prompts(over: Sequence[Entry]) -> None:
    """DataError unless all were measured on the same prompts."""
    digests: dict[str, Entry] = {}
    for entry in over:
        found = json.loads((entry.directory / "data.json").read_text(encoding="utf-8"))
        digests.setdefault(json.dumps(found["held-out"]), entry)
    if len(digests) > 1:
        a, b, *_ = (entry.directory for entry in digests.values())
        raise DataError(
            f"{a} and {b} were measured on different held-out prompts, so they cannot be compared. "
            "Give all methods the same data.heldout_path (or heldout_split, or heldout_fraction), "
            "data.system, data.max_prompt_tokens and evaluation.prompts."
        )


def _problems(
    comparison: Comparison, entries: Sequence[Entry], runs: Mapping[tuple[str, int], Run]
) -> Iterator[str]:
    budget = comparison.budget
    for entry in entries:
        run = runs.get((entry.method, entry.seed))
        if run is None or not run.over:
            yield f"{entry.method}, seed {entry.seed}: {run.state if run else 'not begun'}."
        elif "main" not in _per_prompt(run):
            yield f"{entry.method}, seed {entry.seed}: nothing was measured on held-out prompts."
        elif (spent := run.spent(budget.kind)) < budget.amount:
            yield (
                f"{entry.method}, seed {entry.seed}: its steps were over when {spent:g} of the "
                f"{budget.amount:g} {budget.kind} were spent."
            )
    if len(comparison.seeds) < 2:
        yield (
            "There is one seed: intervals are over prompts alone, and no difference is tested. Set "
            "seeds to three or more."
        )


def write(result: Result, directory: Path) -> None:
    """``comparison.json``."""
    comparison = result.comparison
    found: dict[str, Any] = {
        "comparison": comparison.model_dump(mode="json"),
        "baseline": comparison.against,
        "interval": "95 %, over seeds and prompts",
        "runs": {
            method: {
                str(seed): {"directory": run.directory.name, "state": run.state, "steps": run.done}
                | {kind: run.spent(kind) for kind in KINDS}
                for (of, seed), run in result.runs.items()
                if of == method
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
        atomic_write(file, json.dumps(found, indent=2) + "\n")


def _plain(of: ByMethod) -> dict[str, dict[str, dict[str, Any]]]:
    return {m: {figure: asdict(e) for figure, e in row.items()} for m, row in of.items()}


def render(result: Result) -> str:
    """All tables as text."""
    heads = ["mean over seeds", "steps", *(kind.replace("_", " ") for kind in KINDS)]
    spent = {method: result.spent(method) for method in result.comparison.methods}
    costs = [[m, *(f"{v:,.0f}" for v in of.values())] for m, of in spent.items() if of]
    parts = [table.aligned([heads, *costs])] if costs else []
    for tables in result.tables:
        parts.append(
            f"{tables.name}: {tables.prompts} prompts; mean [95 % interval over seeds and "
            f"prompts], each seed, and the difference from {result.comparison.against}"
        )
        parts += [_of_figure(tables, figure) for figure in tables.labels]
    return "\n\n".join([*parts, "\n".join(result.problems)]).strip()


def _of_figure(tables: Tables, figure: str) -> str:
    rows = [[tables.labels[figure], "", "", "", ""]]
    for method, of in tables.figures.items():
        if (found := of.get(figure)) is None:
            continue
        from_baseline = tables.differences.get(method, {}).get(figure)
        rows.append(
            [
                f"  {method}",
                shown(found),
                " ".join(f"{value:.3g}" for value in found.of_seeds),
                shown(from_baseline, "+") if from_baseline else "",
                tables.verdict(method, figure) if from_baseline else "",
            ]
        )
    return table.aligned(rows)


def shown(of: Estimate, sign: str = "") -> str:
    """With its interval."""
    return f"{of.mean:{sign}.3g} [{of.low:{sign}.3g}, {of.high:{sign}.3g}]"
