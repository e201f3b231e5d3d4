"""Evaluation of models outside a run: evaluation.json, generations.jsonl and the printed tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seqkd import console
from seqkd.escaping import as_json
from seqkd.evaluation import table
from seqkd.evaluation.bartscore import BartScorer
from seqkd.evaluation.catalog import labeled
from seqkd.evaluation.intervals import KIND, Interval
from seqkd.evaluation.length import compare, length_warning
from seqkd.evaluation.table import ModelOutputs
from seqkd.evaluation.tasks import Tasks, with_tasks
from seqkd.evaluation.text import without_eos
from seqkd.types import Prompt

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class PromptSet:
    """Prompts of an evaluation with their references."""

    prompts: list[Prompt]
    references: list[Sequence[str]]
    """Answers from the data set for each prompt, possibly none."""
    decode: Callable[[Sequence[int]], str]
    """Decoder from token ids to text, without special tokens."""
    tokens: Callable[[str], int]
    """Number of tokens of a text."""
    max_tokens: int
    """Token limit of the completions."""
    tasks: Tasks | None = None
    """Tasks whose accuracy is measured."""


def figures_json(
    outputs: Mapping[str, ModelOutputs], held_out: PromptSet, bart: BartScorer | None
) -> dict[str, Any]:
    """Compute all figures, by model, as plain data."""
    prompts = held_out.prompts
    figures = {
        name: table.figures(
            output, prompts, held_out.references, held_out.decode, bart, held_out.tasks
        )
        for name, output in outputs.items()
    }
    if "teacher" not in figures and any(held_out.references):
        figures["references"] = table.reference_lengths(
            held_out.references, held_out.tokens, held_out.max_tokens
        )
    changes = {
        f"{before} -> student": table.changes(figures[before], figures["student"])
        for before in ("initial", "teacher", "references")
        if {before, "student"} <= figures.keys()
    }
    curves = {n: table.curves(o, prompts) for n, o in outputs.items() if o.on_teacher}
    warning = _length_warning(figures, curves)
    return {
        "prompts": len(prompts),
        "with_references": sum(map(bool, held_out.references)),
        "interval": KIND,
        "figures": {n: {k: asdict(v) for k, v in f.table().items()} for n, f in figures.items()},
        "changes": {
            key: {pair: asdict(change[key]) for pair, change in changes.items() if key in change}
            for key in with_tasks(table.FIGURES, *changes.values())
            if any(key in change for change in changes.values())
        },
        "warnings": {"student": warning} if warning else {},
        "per_prompt": {n: {k: v.plain() for k, v in f.ratios.items()} for n, f in figures.items()},
        "curves": curves,
    }


def _length_warning(
    figures: Mapping[str, table.Figures], curves: Mapping[str, Mapping[str, Any]]
) -> str | None:
    """Return the warning about the trained student, compared with the teacher or, without a
    teacher, with the references."""
    other = next((name for name in ("teacher", "references") if name in figures), None)
    if other is None or "student" not in figures:
        return None
    student, others = figures["student"].ratios, figures[other].ratios
    length, ended = (compare(student[name], others[name]) for name in ("length", "ended"))
    ends = curves.get("student", {}).get("end_calibration")
    return length_warning(length, ended, ends, references=other == "references")


def write(
    out: Path,
    evaluation: Mapping[str, Any],
    outputs: Mapping[str, ModelOutputs],
    held_out: PromptSet,
) -> None:
    """Write evaluation.json, and the texts as generations.jsonl, into the directory ``out``."""
    groups = {
        name: table.by_prompt(output.answers.rollouts, held_out.prompts)
        for name, output in outputs.items()
    }
    with (out / "generations.jsonl").open("w", encoding="utf-8") as file:
        for i, prompt in enumerate(held_out.prompts):
            row = {
                "prompt": prompt.text,
                "references": list(held_out.references[i]),
                **{
                    name: [held_out.decode(without_eos(rollout)) for rollout in group[i]]
                    for name, group in groups.items()
                },
            }
            file.write(as_json(row) + "\n")
    text = as_json(evaluation, indent=2)
    (out / "evaluation.json").write_text(text + "\n", encoding="utf-8")


def render(evaluation: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Yield figures, paired changes, curves and warnings for a terminal."""
    figures = {
        name: {key: Interval(**value) for key, value in row.items()}
        for name, row in evaluation["figures"].items()
    }
    yield (
        f"{evaluation['prompts']} prompts, {evaluation['with_references']} with references, "
        f"{evaluation['samples_per_prompt']} completions each; mean [95 % interval over prompts]\n"
    )
    yield table.render(figures)
    changes = evaluation["changes"]
    for pair in dict.fromkeys(pair for change in changes.values() for pair in change):
        intervals = {key: Interval(**row[pair]) for key, row in changes.items() if pair in row}
        yield f"\n{pair}, paired over prompts:"
        yield console.table([f"  {labeled(k)}", str(i), i.verdict] for k, i in intervals.items())
    for name, curves in evaluation["curves"].items():
        yield "\n" + "\n".join(f"{name}: {line}" for line in _curve_lines(curves))
    yield from map(console.red_warning, evaluation.get("warnings", {}).values())


def _curve_lines(curves: Mapping[str, Any]) -> Iterator[str]:
    ends = curves["ends"]
    yield (
        f"mean length difference from the teacher {Interval(**ends['mean_difference'])} tokens "
        f"(up to {ends['horizon']} tokens); largest difference in the share still generating "
        f"{ends['largest_gap']:+.3g} at {ends['largest_gap_at']} tokens"
    )
    if "end_calibration" in curves:
        calibration = curves["end_calibration"]
        yield (
            f"expected ends on the teacher's text {calibration['expected_ends']:.3g}, observed "
            f"{calibration['observed_ends']} "
            f"(calibration error {calibration['calibration_error']:.3g})"
        )
    if "exposure_bias" in curves and (last := curves["exposure_bias"]["at"][-1])["percent"]:
        yield (
            f"excess accumulated error on the student's own text {Interval(**last['percent'])} % "
            f"at {last['length']} tokens"
        )
