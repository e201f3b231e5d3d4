"""The figures of the page that are not curves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from seqkd.config.run import Config
from seqkd.evaluation import table
from seqkd.evaluation.intervals import Interval
from seqkd.evaluation.summary import LABELS, Evaluation
from seqkd.report.curves import column
from seqkd.report.wording import between, change, stage
from seqkd.storage.run_directory import flat
from seqkd.storage.run_reader import Run

RECENT = 5
"""Steps that a figure of a run under way is the mean of."""


@dataclass(frozen=True)
class Headline:
    """One number that a reader looks for first."""

    title: str
    unit: str
    before: str
    after: str
    details: list[str]


@dataclass(frozen=True)
class HeldOut:
    """The figures on held-out prompts."""

    prompts: int
    interval: str
    stages: list[str]
    rows: list[tuple[str, list[Interval | None]]]
    """Name of the figure; its value after each stage."""
    changes: list[tuple[str, str, str]]
    """Name of the figure, between what, and what the paired change is."""


HEADLINES = (
    ("reverse_kl_per_token", "", "Reverse KL per token", "nats"),
    ("forward_kl_per_token", "", "Forward KL per token", "nats"),
    ("student_length", "teacher_length", "Completion length", "tokens"),
    ("student_eos_rate", "teacher_eos_rate", "Ended by itself", "share"),
    ("nll_per_token", "", "Teacher's text, NLL per token", "nats"),
)
TRAINING = (
    ("reverse_kl_per_token", "Reverse KL per token", "nats"),
    ("forward_kl_per_token", "Forward KL per token", "nats"),
    ("length", "Completion length", "tokens"),
    ("eos_rate", "Ended by itself", "share"),
)


def headlines(run: Run) -> list[Headline]:
    """On held-out prompts, first against last, length and end beside the divergence; until they
    are measured, of the steps of the phase under way."""
    stages = list(run.figures.items())
    if not stages:
        return _of_the_steps(run)
    (first_name, (_, first)), (last_name, (_, last)) = stages[0], stages[-1]
    known = [h for h in HEADLINES if h[0] in first and h[0] in last]
    if any("kl" in figure for figure, *_ in known):
        known = [h for h in known if h[0] != "nll_per_token"]
    made = []
    for figure, teacher, title, unit in known:
        details = [f"before {first[figure]}", f"after {last[figure]}"]
        paired = run.evaluation.changes.get(figure, {}) if run.evaluation else {}
        if found := paired.get(f"{first_name} -> {last_name}"):
            details.append(f"change {change(found)}")
        if teacher in last:
            details.append(f"teacher {last[teacher]}")
        made.append(
            Headline(
                title, unit, f"{first[figure].mean:.3g}", f"{last[figure].mean:.3g}",
                details if len(stages) > 1 else details[1:],
            )
        )  # fmt: skip
    return made


def _of_the_steps(run: Run) -> list[Headline]:
    if not run.rows:
        return []
    phase = run.rows[-1].get("phase")
    rows = [row for row in run.rows if row.get("phase") == phase]
    made = []
    for key, title, unit in TRAINING:
        values = column(rows, key)
        values = values[np.isfinite(values)]
        if len(values):
            first, last = values[:RECENT].mean(), values[-RECENT:].mean()
            of = f"in training, phase {phase}: mean of the first and last {RECENT} steps"
            made.append(Headline(title, unit, f"{first:.3g}", f"{last:.3g}", [of]))
    return made


def time_left(run: Run) -> float | None:
    """Seconds of the steps to come, by the last ten; None where none are, or none is known."""
    times = column(run.rows[-10:], "time_step_s")
    if not run.held or not run.total or run.done >= run.total or not np.isfinite(times).any():
        return None
    return float(np.nanmean(times)) * (run.total - run.done)


def heldout(run: Run) -> HeldOut | None:
    """The whole table, but for what was measured within a phase, and the paired changes."""
    if run.evaluation is None or not run.evaluation.figures:
        return None
    return _held_out(run.evaluation, LABELS, stage, between)


def evaluated(run: Run) -> list[tuple[str, HeldOut]]:
    """What seqkd evaluate has measured, by the name of the prompts."""
    return [
        (name, _held_out(of, table.LABELS, str, lambda pair: pair.replace("->", "→")))
        for name, of in run.evaluated.items()
    ]


def _held_out(
    evaluation: Evaluation,
    labels: Mapping[str, str],
    column: Callable[[str], str],
    pair: Callable[[str], str],
) -> HeldOut:
    figures = {s: of for s, of in evaluation.figures.items() if not s.startswith("step ")}
    return HeldOut(
        evaluation.prompts,
        evaluation.interval,
        list(map(column, figures)),
        [
            (labels.get(key, key), [of.get(key) for of in figures.values()])
            for key in _keys([evaluation], labels)
        ],
        [
            (labels.get(figure, figure), pair(names), change(found))
            for figure, pairs in evaluation.changes.items()
            for names, found in pairs.items()
        ],
    )


def last(runs: Sequence[Run]) -> tuple[list[str], list[tuple[Run, str, list[Interval | None]]]]:
    """Names of the figures, and of each run the stage of its last measurement with its figures.
    Lengths and endings come right after the divergences per token."""
    first = [figure for of in HEADLINES for figure in of[:2] if figure]
    keys = sorted(
        _keys([run.evaluation for run in runs if run.evaluation]),
        key=lambda key: first.index(key) if key in first else len(first),
    )
    rows = []
    for run in runs:
        stage, (_, found) = [("", (0, {})), *run.figures.items()][-1]
        rows.append((run, stage, [found.get(key) for key in keys]))
    return [LABELS.get(key, key) for key in keys], rows


def differing(configs: Sequence[Config | None]) -> list[tuple[str, list[str]]]:
    """Keys of the configurations that are not the same in all of them, with the value of each.
    Without where a run is, what it is called, what is inside of a part that another run has not,
    and the options that one kind has, always the same, and another has not."""
    settings = [flat(config) if config else {} for config in configs]
    keys = dict.fromkeys(key for of in settings for key in of if key not in ("name", "runs_dir"))

    def value(of: Mapping[str, Any], key: str) -> str:
        inside = any(other.startswith(f"{key}.") for other in of)
        return "set" if inside else str(of.get(key, "–"))

    values = {key: [value(of, key) for of in settings] for key in keys}
    rows = {key: of for key, of in values.items() if len(set(of)) > 1}

    def told(key: str) -> bool:
        *parts, _ = key.split(".")
        above = {".".join(parts[: i + 1]) for i in range(len(parts))}
        found = {str(of[key]) for of in settings if key in of}
        lacking = any(key not in of for of in settings)
        of_one_kind = f"{'.'.join(parts)}.kind" in rows and lacking and len(found) == 1
        return bool(above & rows.keys()) or of_one_kind

    return [(key, of) for key, of in rows.items() if not told(key)]


def _keys(evaluations: Sequence[Evaluation], labels: Mapping[str, str] = LABELS) -> list[str]:
    """Figures that any of them has: in the order of the labels, then what has none."""
    found = dict.fromkeys(
        key for of in evaluations for figures in of.figures.values() for key in figures
    )
    return [key for key in labels if key in found] + [key for key in found if key not in labels]
