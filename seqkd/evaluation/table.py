"""Figures of the completions of several models, side by side.

Definitions, units and limitations of each figure: docs/evaluation.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from seqkd import console
from seqkd.evaluation.bartscore import BartScorer
from seqkd.evaluation.calibration import end_calibration
from seqkd.evaluation.catalog import labeled, limits
from seqkd.evaluation.curves import Lengths, TokenValues, compare_ends, exposure_bias, length_rates
from seqkd.evaluation.heldout import Answers, aggregate_by_prompt, totals
from seqkd.evaluation.intervals import Interval, Ratio, paired_change
from seqkd.evaluation.tasks import PREFIX, Tasks, with_tasks
from seqkd.evaluation.text import distinct, per_prompt, repeated, rouge, self_bleu, without_eos
from seqkd.types import Prompt, Rollout

if TYPE_CHECKING:
    from rich.table import Table

MEASURED = (
    "reverse_kl_per_token", "reverse_kl_per_sequence",
    "forward_kl_per_token", "forward_kl_per_sequence",
    "teacher_nll_per_token",
)  # fmt: skip
"""Rows of the table that come from :class:`seqkd.evaluation.heldout.Measurement`."""
FIGURES = (
    *MEASURED, "perplexity", "rouge1", "rouge2", "rougeL",
    "bartscore_f", "bartscore_precision", "bartscore_recall", "length", "ended", "repetition",
    "distinct1", "distinct2", "distinct3", "self_bleu",
)  # fmt: skip
"""Rows of the table in order, by their names in evaluation.json."""


@dataclass(frozen=True)
class ModelOutputs:
    """Completions of one model with their measurements."""

    answers: Answers
    on_teacher: Answers | None = None
    """Teacher's completions as measured by this student; None for the teacher itself and without a
    teacher."""


@dataclass(frozen=True)
class Figures:
    """Figures of one model."""

    ratios: dict[str, Ratio]
    """Figures with a value per prompt."""
    whole: dict[str, float]
    """Figures of all prompts together, without an interval."""

    def table(self) -> dict[str, Interval]:
        """Return every available figure."""
        intervals = {
            name: ratio.interval().within(limits(name)) for name, ratio in self.ratios.items()
        }
        if (nll := intervals.pop("nll_per_token", None)) is not None:
            intervals["perplexity"] = Interval(*map(math.exp, asdict(nll).values()))
        return intervals | {name: Interval(v, v, v) for name, v in self.whole.items()}


def figures(
    written: ModelOutputs,
    prompts: Sequence[Prompt],
    references: Sequence[Sequence[str]],
    decode: Callable[[Sequence[int]], str],
    bart: BartScorer | None,
    tasks: Tasks | None = None,
) -> Figures:
    """Measure all figures of one model.

    Args:
        references: [P] the data set's answers to each prompt, possibly none.
    """
    groups = by_prompt(written.answers.rollouts, prompts)
    texts = [[decode(without_eos(r)) for r in group] for group in groups]
    rouge_scores = rouge(texts, references)
    text = {name: getattr(rouge_scores, name) for name in ("rouge1", "rouge2", "rougeL")}
    if bart is not None:
        scored = bart.score(texts, references)
        text |= {
            f"bartscore_{name}": getattr(scored, name) for name in ("f", "precision", "recall")
        }
    rates = length_rates(_lengths(written.answers, prompts))
    text |= {"length": per_prompt(rates.length), "ended": per_prompt(rates.ended)}
    if tasks is not None:
        rows = [tasks.accuracy(group) for group in groups]
        text |= {PREFIX + name: per_prompt([row[name] for row in rows]) for name in tasks.tasks}
    text |= {"repetition": repeated(groups), "self_bleu": self_bleu(texts)}
    token_ids = [without_eos(r) for r in written.answers.rollouts]
    shares = {f"distinct{n}": distinct(token_ids, n) for n in (1, 2, 3)}
    whole = {name: share for name, share in shares.items() if share is not None}
    ratios = {}
    if written.on_teacher is not None:
        divergences = aggregate_by_prompt(prompts, written.answers, written.on_teacher).ratios()
        names = (*MEASURED, "nll_per_token")  # perplexity is the exponential of the NLL
        ratios = {name: divergences[name] for name in names if name in divergences}
    elif costs := totals(written.answers, "teacher_logprob"):
        sums = [
            [float(sum(value_of(r) for r in g)) for g in groups]
            for value_of in (lambda r: -costs[r.sample_id], lambda r: len(r.completion_ids))
        ]
        ratios["teacher_nll_per_token"] = Ratio(*map(np.array, sums))
    return Figures(ratios | {n: v.ratio() for n, v in text.items() if v.values}, whole)


def reference_lengths(
    references: Sequence[Sequence[str]], tokens: Callable[[str], int], max_tokens: int
) -> Figures:
    """Measure length and EOS rate of the references as if they were completions: with a token that
    ends them, and cut at ``max_tokens``.

    Args:
        references: [P] the data set's answers to each prompt, possibly none.
        tokens: number of tokens of a text.
    """
    lengths = [[tokens(text) + 1 for text in texts] for texts in references]
    values = {
        "length": [np.minimum(row, max_tokens).mean() if row else None for row in lengths],
        "ended": [(np.array(row) <= max_tokens).mean() if row else None for row in lengths],
    }
    return Figures({name: per_prompt(column).ratio() for name, column in values.items()}, {})


def changes(before: Figures, after: Figures) -> dict[str, Interval]:
    """Return after - before for every figure with a value per prompt, with paired resampling."""
    order = with_tasks(FIGURES, before.ratios)
    both = [name for name in order if name in before.ratios.keys() & after.ratios.keys()]
    pairs = {name: (before.ratios[name], after.ratios[name]) for name in both}
    return {
        name: paired_change(a, b) for name, (a, b) in pairs.items() if (a.below * b.below).any()
    }


def curves(written: ModelOutputs, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Compute the curves of one student as plain data: the ends of its completions compared with
    the teacher's, and exposure bias and end calibration if they are available."""
    assert written.on_teacher is not None
    teacher_text, own_text = written.answers, written.on_teacher
    curves_json: dict[str, Any] = {
        "ends": asdict(compare_ends(_lengths(teacher_text, prompts), _lengths(own_text, prompts)))
    }
    costs = [_values(answers, "forward_kl", prompts) for answers in (teacher_text, own_text)]
    if all(c is not None for c in costs):
        curves_json["exposure_bias"] = asdict(exposure_bias(*costs))  # type: ignore[arg-type]
    log_ends = _values(own_text, "end_logprob", prompts)
    if log_ends is not None:
        probabilities = TokenValues([np.exp(row) for row in log_ends.values], log_ends.prompts)
        ended = [r.finish_reason == "stop" for r in own_text.rollouts]
        curves_json["end_calibration"] = asdict(end_calibration(probabilities, ended))
    return curves_json


def render(models: Mapping[str, Mapping[str, Interval]]) -> Table:
    """Return the figures of several models, one column per model, for a terminal."""
    order = with_tasks(FIGURES, *models.values())
    names = [name for name in order if any(name in column for column in models.values())]
    rows = [[labeled(n), *(_cell(column.get(n)) for column in models.values())] for n in names]
    return console.table(rows, ["", *models])


def _cell(value: Interval | None) -> str:
    if value is None:
        return "-"
    return str(value) if value.low < value.high else f"{value.mean:.3g}"


def by_prompt(rollouts: Sequence[Rollout], prompts: Sequence[Prompt]) -> list[list[Rollout]]:
    """Return [P] the samples of each prompt."""
    groups: dict[str, list[Rollout]] = {p.prompt_id: [] for p in prompts}
    for rollout in rollouts:
        groups[rollout.prompt_id].append(rollout)
    return list(groups.values())


def _places(answers: Answers, prompts: Sequence[Prompt]) -> list[int]:
    """Return [N] the index of each completion's prompt."""
    index = {p.prompt_id: i for i, p in enumerate(prompts)}
    return [index[r.prompt_id] for r in answers.rollouts]


def _lengths(answers: Answers, prompts: Sequence[Prompt]) -> Lengths:
    rollouts = answers.rollouts
    return Lengths(
        [len(r.completion_ids) for r in rollouts],
        [r.finish_reason == "stop" for r in rollouts],
        _places(answers, prompts),
    )


def _values(answers: Answers, name: str, prompts: Sequence[Prompt]) -> TokenValues | None:
    rows = [answers.measured[r.sample_id].get(name) for r in answers.rollouts]
    present = [row for row in rows if row is not None]
    return TokenValues(present, _places(answers, prompts)) if len(present) == len(rows) else None
