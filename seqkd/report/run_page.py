"""Report page of one run, or of several runs side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from seqkd.config.wording import describe_phase, model_names
from seqkd.evaluation import heldout, table
from seqkd.evaluation.catalog import metric
from seqkd.evaluation.heldout import teacher_figure
from seqkd.evaluation.intervals import Interval
from seqkd.evaluation.summary import stage_label
from seqkd.evaluation.tasks import PREFIX
from seqkd.report import page, plots, samples, wording
from seqkd.report.curves import Array, column
from seqkd.report.page import Table
from seqkd.report.svg import Key, Panel
from seqkd.storage.run_reader import Run
from seqkd.training.clock import STAGES

HEADLINES = (
    "reverse_kl_per_token", "forward_kl_per_token", "student_length", "student_eos_rate",
)  # fmt: skip
"""Figures shown first: length is always reported with divergence."""


def render(runs: Sequence[Run], refresh: float | None) -> str:
    """Return the page of the runs, which reloads itself every ``refresh`` seconds if set."""
    keys = [Key(index, f"{index + 1}. {run.name}") for index, run in enumerate(runs)]
    return page.render(
        "run.html",
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared",
        refresh=refresh,
        runs=dict(zip(keys, runs, strict=True)),
        models=page.shared([run.config and model_names(run.config) for run in runs]),
        phases={key: _phases(run) for key, run in zip(keys, runs, strict=True)},
        facts=facts(runs[0]),
        notes=list(_notes(runs)),
        warnings=list(_warnings(runs)),
        headlines=headlines(runs[0]) if len(runs) == 1 else {},
        interval=runs[0].evaluation and runs[0].evaluation.interval,
        tables=held_out(runs[0]) if len(runs) == 1 else [last_figures(runs, keys)],
        evaluated=evaluated(runs[0]) if len(runs) == 1 else {},
        examples=samples.side_by_side(
            {key.label: run for key, run in zip(keys, runs, strict=True)}
        ),
        curves=dict(plots.curve_panels(runs)),
        times=list(times(runs)),
        differing=page.differing([run.config for run in runs], keys),
    )


def facts(run: Run) -> dict[str, str]:
    """Return the state and the size of a run."""
    rows = {"State": run.state}
    if run.environment and isinstance(run.environment.get("started"), str):
        rows["Started (UTC)"] = run.environment["started"][:16].replace("T", " ")
    if run.written:
        rows["Last step (UTC)"] = f"{run.written:%Y-%m-%d %H:%M}"
    rows["Steps"] = f"{run.done} of {run.total}" if run.total else str(run.done)
    rows["Time in steps"] = wording.duration(run.seconds)
    rows["Trained tokens"] = wording.count(run.spent("learner_tokens"))
    return rows


def headlines(run: Run) -> dict[str, tuple[Interval, Interval, list[str]]]:
    """Return the first figures before and after training, with lines of details."""
    if not run.figures or run.evaluation is None:
        return {}
    stages = [(stage, row) for stage, (_, row) in run.figures.items()]
    (first_stage, first), (last_stage, last) = stages[0], stages[-1]
    lines = {}
    tasks = [name for name in first if name.startswith(PREFIX)]
    for name in (*tasks, *HEADLINES):
        if name not in first or name not in last:
            continue
        details = [f"before {first[name]}"] if len(stages) > 1 else []
        details.append(f"after {last[name]}")
        changes = run.evaluation.changes.get(name, {})
        if change := changes.get(f"{first_stage} -> {last_stage}"):
            details.append(f"change {wording.change(change)}")
        if (teacher := teacher_figure(name)) in last:
            details.append(f"teacher {last[teacher]}")
        lines[name] = first[name], last[name], details
    return lines


def held_out(run: Run) -> list[Table]:
    """Return tables of the figures before, between and after the phases, and of the paired
    changes."""
    if run.evaluation is None:
        return []
    figures: Mapping[str | Key, Any] = {
        stage_label(stage): row
        for stage, row in run.evaluation.figures.items()
        if not stage.startswith("step ")
    }
    return [
        page.figure_table("Held-out figures", figures, list(heldout.FIGURES)),
        page.change_table(run.evaluation, wording.between),
    ]


def last_figures(runs: Sequence[Run], keys: Sequence[Key]) -> Table:
    """Return a table of the last measurement of each run."""
    last = [[row for _, row in run.figures.values()][-1:] or [{}] for run in runs]
    figures: dict[str | Key, Any] = {key: row for key, (row,) in zip(keys, last, strict=True)}
    names = list(dict.fromkeys((*HEADLINES, *heldout.FIGURES)))
    return page.figure_table("Last held-out figures of every run", figures, names)


def evaluated(run: Run) -> dict[str, tuple[int, list[str], list[Table]]]:
    """Return the number of prompts, the warnings and the tables of seqkd evaluate, by prompt
    set."""
    return {
        name: (
            evaluation.prompts,
            list(evaluation.warnings.values()),
            [
                page.figure_table("Figures by model", dict(evaluation.figures), table.FIGURES),
                page.change_table(evaluation, lambda pair: pair.replace(" -> ", " → ")),
            ],
        )
        for name, evaluation in run.evaluated.items()
    }


def stage_seconds(run: Run) -> tuple[Array, dict[str, Array]]:
    """Return [N] the steps with recorded time, and [N] the seconds of each stage. The remaining
    time of a step is "other"."""
    total = column(run.rows, "time_step_s")
    recorded = np.isfinite(total)
    steps = np.array([row["step"] for row in run.rows], dtype=float)[recorded]
    stages = {
        metric(name).label: np.nan_to_num(column(run.rows, name))[recorded]
        for name in (f"time_{stage}_s" for stage in STAGES)
    }
    other = np.maximum(total[recorded] - sum(stages.values(), np.zeros(len(steps))), 0)
    return steps, stages | {"other": other}


def times(runs: Sequence[Run]) -> Iterator[tuple[str, Table, Panel]]:
    """Yield name, table and plot of the stages of each run."""
    for index, run in enumerate(runs):
        steps, stages = stage_seconds(run)
        if not len(steps):
            continue
        whole = max(sum(each.sum() for each in stages.values()), 1e-12)
        rows = [
            [
                Key(i, name),
                f"{each.sum():.1f} s",
                f"{100 * each.sum() / whole:.1f} %",
                f"{np.median(each):.3f} s",
            ]
            for i, (name, each) in enumerate(stages.items())
        ]
        heads = ["Stage", "Time", "Share", "Median per step"]
        panel = plots.stage_panel(f"stages-{index}", run.name, steps, stages)
        yield run.name, Table(f"Stages of {run.name}", heads, rows), panel


def _phases(run: Run) -> list[str]:
    phases = run.config.phases if run.config else ()
    return [describe_phase(run.config, name, phase) for name, phase in phases if run.config]


def _warnings(runs: Sequence[Run]) -> Iterator[str]:
    """Yield the warnings about the last measured student of each run."""
    for run in runs:
        yield from (f"{run.name}: {text}" if len(runs) > 1 else text for text in run.warnings)


def _notes(runs: Sequence[Run]) -> Iterator[str]:
    """Yield one line per missing or damaged part of the runs."""
    for run in runs:
        notes = list(run.problems)
        if not run.rows and not run.problems:
            notes.append("No step is recorded yet.")
        if run.evaluation is None:
            notes.append("There are no held-out figures.")
        elif set(run.evaluation.figures) - set(run.figures):
            notes.append("evaluation.json is from before this run was extended.")
        if run.environment is None:
            notes.append("There is no environment.json: the software versions are unknown.")
        yield from (f"{run.name}: {note}" if len(runs) > 1 else note for note in notes)
