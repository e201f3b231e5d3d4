"""Held-out figures of a run: evaluation.json and its text form."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import numpy as np

from seqkd import console
from seqkd.evaluation.catalog import labeled, metric
from seqkd.evaluation.heldout import FIGURES, TEACHER_FIGURES, Example, Measurement
from seqkd.evaluation.intervals import KIND, Interval, Ratio, paired_change
from seqkd.evaluation.length import compare, length_warning
from seqkd.evaluation.tasks import PREFIX, with_tasks
from seqkd.types import Prompt

if TYPE_CHECKING:
    from rich.console import RenderableType


def evaluation_json(
    measurements: Mapping[str, Measurement],
    prompts: Sequence[Prompt],
    tokenizer: Any,
    examples: int,
) -> dict[str, Any]:
    """Return all measurements as plain data: figures by stage, paired changes, completions.

    The last stage is compared with the teacher. A warning is about a trained student only."""
    ratios = {stage: m.ratios() for stage, m in measurements.items()}
    tables = {stage: m.table() for stage, m in measurements.items()}
    phases = [stage for stage in ratios if not stage.startswith("step ")]
    measured_figures = next(iter(tables.values()))
    divergences: list[str] = ["reverse_kl_per_token", "forward_kl_per_token"]
    tasks = [name for name in measured_figures if name.startswith(PREFIX)]
    changes = {
        figure: {
            f"{a} -> {b}": asdict(paired_change(ratios[a][figure], ratios[b][figure]))
            for a, b in _pairs(phases)
        }
        for figure in (
            *tasks,
            *([f for f in divergences if f in measured_figures] or ["nll_per_token"]),
        )
    }
    stage, last = list(ratios.items())[-1]
    from_teacher = {f: compare(last[f], last[other]) for f, other in TEACHER_FIGURES.items()}
    changes |= {f: {f"teacher -> {stage}": asdict(c.change)} for f, c in from_teacher.items()}
    length, ended = from_teacher["student_length"], from_teacher["student_eos_rate"]
    warning = None if stage == "initial" else length_warning(length, ended)
    return {
        "prompts": len(prompts),
        "interval": KIND,
        "figures": {s: {k: asdict(v) for k, v in t.items()} for s, t in tables.items()},
        "changes": changes,
        "warnings": {stage: warning} if warning else {},
        "per_prompt": {s: {k: v.plain() for k, v in row.items()} for s, row in ratios.items()},
        "examples": [
            _example(i, measurements, prompts, tokenizer)
            for i in range(min(examples, len(prompts)))
        ],
    }


def render(evaluation: dict[str, Any]) -> Iterator[RenderableType]:
    """Yield the figures, the paired changes, the warnings and the completions for a terminal."""
    stages = [stage for stage in evaluation["figures"] if not stage.startswith("step ")]
    first = evaluation["figures"][stages[0]]
    names = [name for name in with_tasks(FIGURES, first) if name in first]
    yield f"Held-out prompts: {evaluation['prompts']}; mean [95 % interval over prompts]\n"
    rows = [
        [labeled(name), *(str(Interval(**evaluation["figures"][s][name])) for s in stages)]
        for name in names
    ]
    yield console.table(rows, ["", *map(stage_label, stages)])
    yield ""
    for figure, changes in evaluation["changes"].items():
        for pair, change in changes.items():
            interval = Interval(**change)
            yield (
                f"{metric(figure).label}, {pair}: {interval} "
                f"(paired over prompts; {interval.verdict})"
            )
    yield from map(console.red_warning, evaluation.get("warnings", {}).values())
    for example in evaluation["examples"]:
        yield f"\nPrompt: {_shown(example['prompt'])}"
        yield console.table(
            (f"  {who}", _shown(text)) for who, text in example["completions"].items()
        )


def _pairs(stages: list[str]) -> list[tuple[str, str]]:
    pairs = list(pairwise(stages))
    return [*pairs, (stages[0], stages[-1])] if len(pairs) > 1 else pairs


def stage_label(stage: str) -> str:
    """Return the label of a measurement, for example "before", "after warmup" or "teacher"."""
    return {"initial": "before", "teacher": "teacher"}.get(stage, f"after {stage}")


def _example(
    i: int, measurements: Mapping[str, Measurement], prompts: Sequence[Prompt], tokenizer: Any
) -> dict[str, Any]:
    first, last = next(iter(measurements.values())), list(measurements.values())[-1]
    completions = {"teacher": first.teacher[i], "student before": first.student[i]}
    if last is not first:
        completions["student after"] = last.student[i]
    return {
        "prompt": prompts[i].text,
        "completions": {
            who: tokenizer.decode(shown.rollout.completion_ids, skip_special_tokens=True)
            + ("" if shown.rollout.finish_reason == "stop" else " …")
            for who, shown in completions.items()
        },
        "tokens": {who: _tokens(shown, tokenizer) for who, shown in completions.items()},
    }


def _tokens(shown: Example, tokenizer: Any) -> list[tuple[str, float | None]]:
    """Return the text of each token with its divergence. A character that spans several tokens is
    assigned to the last of them."""
    ids, cells, shown_text = shown.rollout.completion_ids, [], ""
    costs = shown.costs or (None,) * len(ids)
    for end, cost in enumerate(costs, 1):
        text = tokenizer.decode(ids[:end])
        partial = text.endswith("\N{REPLACEMENT CHARACTER}") and end < len(ids)
        whole = shown_text if partial else text
        cells.append((whole[len(shown_text) :], cost))
        shown_text = whole
    return cells


def _shown(text: str) -> str:
    return " ".join(text.split()) or "(nothing)"


def closing(directory: Path, stage_seconds: Mapping[str, float], seconds: float) -> str:
    """Return the last lines of a run: time by stage and paths."""
    stages = ", ".join(f"{stage} {spent:.0f} s" for stage, spent in stage_seconds.items())
    adapter = directory / "student_adapter"
    return (
        f"Finished in {int(seconds // 60)} min {int(seconds % 60)} s (training steps: {stages}).\n"
        f"report:      {directory / 'report.html'}\n"
        f"student:     {directory / 'student'}\n"
        + (f"adapter:     {adapter}\n" if adapter.is_dir() else "")
        + f"metrics:     {directory / 'metrics.jsonl'}\n"
        f"TensorBoard: tensorboard --logdir {quote(str(directory / 'tensorboard'))}"
    )


Token = tuple[str, float | None]
"""Text and divergence in nats; None if the divergence is unknown."""


@dataclass(frozen=True)
class Completions:
    """Completions of one held-out prompt, by author."""

    prompt: str
    completions: dict[str, str]
    tokens: dict[str, list[Token]]
    """Tokens by author, for completions with known per-token divergences."""


@dataclass(frozen=True)
class Evaluation:
    """Content of evaluation.json."""

    prompts: int
    interval: str
    figures: dict[str, dict[str, Interval]]
    """Intervals by stage ("initial" first) and figure."""
    changes: dict[str, dict[str, Interval]]
    """Changes, paired over prompts, by figure and "before -> after"."""
    warnings: dict[str, str]
    """Warnings about completion length, by stage."""
    per_prompt: dict[str, dict[str, Ratio]]
    """Sums of each prompt by stage and figure."""
    examples: list[Completions]


def number(row: Mapping[str, Any], key: str) -> float | None:
    """Return a number of a row; None if it is missing or not finite."""
    value = row.get(key)
    finite = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if finite else None  # type: ignore[arg-type]


def read_figures(file: Path) -> Evaluation:
    """Read evaluation.json. Raises OSError, ValueError, KeyError or TypeError."""
    content = json.loads(file.read_text(encoding="utf-8"))
    return Evaluation(
        prompts=int(content["prompts"]),
        interval=str(content.get("interval", "")),
        figures={stage: _intervals(row) for stage, row in content["figures"].items()},
        changes={figure: _intervals(row) for figure, row in content.get("changes", {}).items()},
        warnings={str(stage): str(text) for stage, text in content.get("warnings", {}).items()},
        per_prompt={stage: ratios(row) for stage, row in content.get("per_prompt", {}).items()},
        examples=[read_completions(example) for example in content.get("examples", [])],
    )


def ratios(rows: Mapping[str, Any]) -> dict[str, Ratio]:
    """Read ratios by figure, as written by :meth:`seqkd.evaluation.intervals.Ratio.plain`."""
    return {
        name: Ratio(np.array(sums["above"], dtype=float), np.array(sums["below"], dtype=float))
        for name, sums in rows.items()
    }


def _intervals(row: Mapping[str, Any]) -> dict[str, Interval]:
    """Read the figures that have a mean and an interval."""
    fields = ("mean", "low", "high")
    return {
        name: Interval(*(float(value[field]) for field in fields))
        for name, value in row.items()
        if isinstance(value, dict) and all(number(value, field) is not None for field in fields)
    }


def read_completions(example: Mapping[str, Any]) -> Completions:
    """Read one example of evaluation.json."""
    tokens = example.get("tokens") or {}
    return Completions(
        str(example["prompt"]),
        {who: str(text) for who, text in example["completions"].items()},
        {
            who: [(str(text), number({"kl": kl}, "kl")) for text, kl in row]
            for who, row in tokens.items()
        },
    )
