"""The page: what stands in it, for the template."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from seqkd.files import atomic_write, disk_errors
from seqkd.report import panels, samples, tables, timing, wording
from seqkd.report.svg import SERIES
from seqkd.storage.run_reader import Run


def render(runs: Sequence[Run], refresh: float | None) -> str:
    """HTML of one run, or of several beside each other; it loads itself anew after ``refresh``
    seconds."""
    several = len(runs) > 1
    headers = [header(run, index) for index, run in enumerate(runs)]
    drawn = any(run.rows for run in runs)
    other, constant = panels.others(runs[0]) if drawn and not several else ([], [])
    return template("page.html").render(
        title=f"{len(runs)} runs compared" if several else runs[0].name,
        several=several,
        refresh=refresh,
        written=datetime.now(UTC),
        headers=headers,
        shared={name: _shared([of[name] for of in headers]) for name in ("models", "phases")},
        headlines=[] if several else tables.headlines(runs[0]),
        heldout=None if several else tables.heldout(runs[0]),
        evaluated=[] if several else tables.evaluated(runs[0]),
        last=tables.last(runs) if several else None,
        differing=tables.differing([run.config for run in runs]) if several else [],
        notes=list(_notes(runs)),
        samples=samples.side_by_side(runs),
        coloured=samples.coloured(runs),
        legend=samples.legend(),
        section_notes=panels.NOTES,
        sections=list(panels.sections(runs)) if drawn else [],
        marks=_marks(runs),
        others=other,
        constant=constant,
        stages=[] if several else timing.table(runs[0]),
        timing=timing.panels(runs),
        runs=runs,
    )


def template(name: str) -> Template:
    """One of those beside this file, with what all of them use."""
    environment = Environment(
        loader=PackageLoader("seqkd.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"stage": wording.stage, "between": wording.between}
    return environment.get_template(name)


def save(text: str, out: Path) -> None:
    """Readers find the page before or after, never a part of it. StorageError where it cannot be
    written."""
    with disk_errors(out):
        atomic_write(out, text)


def header(run: Run, index: int) -> dict[str, Any]:
    """What a run is, how far it has come, and what it is called in the plots."""
    known: dict[str, Any] = {"State": run.state}
    if run.environment and isinstance(run.environment.get("started"), str):
        known["Started (UTC)"] = run.environment["started"][:16].replace("T", " ")
    if run.written:
        known["Last step (UTC)"] = f"{run.written:%Y-%m-%d %H:%M}"
    known["Steps"] = f"{run.done} of {run.total}" if run.total else str(run.done)
    if run.rows:
        known["Time in steps"] = wording.duration(run.seconds)
        known["Tokens learnt from"] = wording.count(run.spent("learner_tokens"))
    if left := tables.time_left(run):
        known["Time left"] = f"about {wording.duration(left)}"
    return {
        "number": index + 1,
        "colour": f"series-{index % SERIES + 1}",
        "name": run.name,
        "directory": str(run.directory),
        "models": wording.models(run.config) if run.config else None,
        "phases": wording.phases(run.config) if run.config else [],
        "facts": known,
        "done": run.done,
        "total": run.total,
        "over": run.over,
    }


def _marks(runs: Sequence[Run]) -> dict[str, bool]:
    """Which of the marks that are explained occur in the curves."""
    figures = [of for run in runs for _, of in run.figures.values()]
    return {
        "held": bool(figures),
        "teacher": any("teacher_length" in of for of in figures),
        "skipped": any(row.get("skipped") for run in runs for row in run.rows),
        "bands": len(runs[0].spans) > 1 and len({tuple(run.spans) for run in runs}) == 1,
    }


def _shared(values: Sequence[Any]) -> Any:
    """What is the same of all runs; None where it is not."""
    return values[0] if all(value == values[0] for value in values) else None


def _notes(runs: Sequence[Run]) -> Iterator[str]:
    """What is missing, in a line each."""
    for run in runs:
        of = f"{run.name}: " if len(runs) > 1 else ""
        yield from (f"{of}{problem}" for problem in run.problems)
        if not run.rows and not run.problems:
            yield f"{of}no step is recorded yet: curves come with the first."
        asked = run.config is None or run.config.evaluation.prompts
        if run.evaluation is None:
            yield (
                f"{of}no held-out figures yet: they come when the student is first measured."
                if asked and not run.over
                else f"{of}nothing was measured on held-out prompts."
            )
        elif set(run.evaluation.figures) - set(run.figures):
            yield f"{of}evaluation.json is of an earlier end of this run, which goes on beyond it."
        if run.environment is None:
            yield f"{of}no environment.json: on which versions it ran is not known."
        if run.evaluation and run.evaluation.examples and not samples.coloured([run]):
            yield f"{of}completions without a divergence for each token are shown as plain text."
