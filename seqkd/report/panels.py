"""Which figures are drawn over the steps, and how: one small plot a figure, every run in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from markupsafe import Markup

from seqkd.report import plots
from seqkd.report.curves import Array, Axis, column
from seqkd.report.plots import Track
from seqkd.report.svg import SERIES, plot
from seqkd.storage.run_reader import Run


@dataclass(frozen=True)
class Figure:
    """One figure of metrics.jsonl."""

    key: str
    title: str
    unit: str
    held: str = ""
    """The same figure on held-out prompts, in evaluation.json."""
    teacher: str = ""
    """That of the teacher there."""
    smooth: bool = True


DIVERGENCES = (
    Figure("reverse_kl_per_token", "Reverse KL per token", "nats", "reverse_kl_per_token"),
    Figure("forward_kl_per_token", "Forward KL per token", "nats", "forward_kl_per_token"),
)
SECTIONS: dict[str, tuple[Figure, ...]] = {
    "Divergence and loss": (*DIVERGENCES, Figure("loss", "Loss", "of the objective")),
    "Length, endings and variety": (
        Figure("length", "Completion length", "tokens", "student_length", "teacher_length"),
        Figure("eos_rate", "Ended by itself", "share", "student_eos_rate", "teacher_eos_rate"),
        Figure("truncation_rate", "Cut at the token limit", "share"),
        Figure("entropy_per_token", "Student's entropy", "nats per token"),
        Figure("repetition", "Repeated 4-grams", "share"),
    ),
    "Optimization": (
        Figure("grad_norm", "Gradient norm", "before clipping"),
        Figure("lr", "Learning rate", "", smooth=False),
        Figure("student_logprob_per_token", "Student's log-prob", "nats per token"),
        Figure("teacher_logprob_per_token", "Teacher's log-prob", "nats per token"),
    ),
    "Sampler against learner": (
        Figure("logprob_gap_mean", "Log-prob gap, mean", "nats per token"),
        Figure("logprob_gap_max", "Log-prob gap, greatest", "nats"),
        Figure("k1_per_token", "Divergence by k1", "nats per token"),
        Figure("k3_per_token", "Divergence by k3", "nats per token"),
        Figure("ratio_mean", "Importance ratio, mean", "1 in expectation"),
        Figure("ratio_effective_sample_size", "Effective sample size", "share"),
    ),
    "Samples of the teacher mixed in": (
        Figure("teacher_samples", "Teacher's samples", "a step"),
        Figure("mean_weight", "Mean weight", "1 in expectation"),
        Figure("effective_sample_size", "Effective sample size", "sequences"),
    ),
}
NOTES = {
    "Sampler against learner": "The student that drew the samples against the one that learns from "
    "them: gaps between their log-probs of the same tokens where they should be none, two "
    "estimates of the divergence between them, and the importance ratios of whole sequences.",
    "Samples of the teacher mixed in": "Each completion of a mixture is weighted by the student's "
    "probability of it over that of the mixture.",
}
COSTS: tuple[Axis, ...] = ("learner_tokens", "seconds")
"""What divergences are drawn against besides the steps."""
OPTIONAL = ("Samples of the teacher mixed in",)
"""Sections of which nothing is said where they are empty."""
NO_FIGURE = {"step", "policy_version", "rollout_policy_version"}
"""Numbers of a row that count on their own."""


@dataclass(frozen=True)
class Panel:
    """A plot with what stands around it."""

    title: str
    unit: str
    svg: Markup
    names: list[tuple[str, str]] = field(default_factory=list)
    """Colour (a variable of the style sheet) and name of curves that need one."""


def sections(runs: Sequence[Run]) -> Iterator[tuple[str, list[Panel], list[str]]]:
    """Heading, plots, and the figures that no run has."""
    for heading, figures in SECTIONS.items():
        panels = {figure: panel(runs, figure) for figure in figures}
        found = [made for made in panels.values() if made]
        missing = [figure.title for figure in figures if not panels[figure]]
        if found or heading not in OPTIONAL:
            yield heading, found, missing
    against = [panel(runs, figure, on) for on in COSTS for figure in DIVERGENCES]
    if found := [made for made in against if made]:
        yield "Divergence against what it cost", found, []


def others(run: Run) -> tuple[list[Panel], list[str]]:
    """Plots of what else was recorded, and a line for each figure that never changed."""
    known = {figure.key for figures in SECTIONS.values() for figure in figures}
    names = dict.fromkeys(key.rpartition("/")[2] for row in run.rows for key in row)
    panels: list[Panel] = []
    constant = []
    for name in names:
        values = column(run.rows, name)
        values = values[np.isfinite(values)]
        if name in known | NO_FIGURE or name.startswith("time_") or not len(values):
            continue
        if np.ptp(values) == 0:
            constant.append(f"{name} {values[0]:.6g}")
        elif made := panel([run], Figure(name, name, "")):
            panels.append(made)
    return panels, constant


def panel(runs: Sequence[Run], figure: Figure, on: Axis = "steps") -> Panel | None:
    """One plot; None where no run has the figure."""
    tracks = list(_tracks(runs, figure))
    if not tracks:
        return None
    logarithmic = _logarithmic(np.concatenate([column(t.run.rows, t.key) for t in tracks]))
    unit = ", ".join(filter(None, (figure.unit, "log scale" if logarithmic else "")))
    with plot(f"{figure.key}-{on}".replace("_", "-"), figure.title) as made:
        if logarithmic:
            made.axes.set_yscale("log")
        plots.tracks(made, tracks, on, figure.smooth)
        for index, run in enumerate(runs):
            plots.held_out(made, run, index, len(runs), figure.held, figure.teacher, on)
        plots.frame(made, runs, on)
        if len(runs) > 1:
            plots.numbers(made, plots.ends(tracks, on, figure.smooth))
    names = [(f"series-{t.colour % SERIES + 1}", t.name) for t in tracks]
    return Panel(figure.title, unit, made.svg, names if len(runs) == 1 < len(tracks) else [])


def _tracks(runs: Sequence[Run], figure: Figure) -> Iterator[Track]:
    """Of each run the samples that its phases are named for; of one alone those of every
    sampler."""
    for index, run in enumerate(runs):
        keys = dict.fromkeys(key for row in run.rows for key in row)
        found = [key for key in keys if key.rpartition("/")[2] == figure.key]
        known = [key for key in found if np.isfinite(column(run.rows, key)).any()]
        if len(runs) > 1:
            yield from (Track(run, key, run.name, index) for key in known if key == figure.key)
            continue
        for colour, key in enumerate(sorted(known, key=lambda key: "/" in key)):
            sampler = key.rpartition("/")[0] or "the phase's own"
            yield Track(run, key, f"{sampler} samples", colour)


def _logarithmic(values: Array) -> bool:
    values = values[np.isfinite(values)]
    return bool(values.min() > 0 and values.max() / values.min() > 100)
