"""How close samples are to reference texts, and how much they differ among themselves.

Definitions, sources and what each metric hides: docs/evaluation.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from seqkd.evaluation.intervals import Interval, Ratio
from seqkd.types import Rollout

if TYPE_CHECKING:
    pass

ROUGE = ("rouge1", "rouge2", "rougeL")


@dataclass(frozen=True)
class PerPrompt:
    """A metric at the prompts where it is defined: D of all prompts, in their order."""

    values: tuple[float, ...]
    """[D] mean over the samples of each prompt."""
    prompts: tuple[int, ...]
    """[D] which prompts these are."""
    left_out: int
    """Prompts where the metric is not defined."""

    def interval(self) -> Interval | None:
        """Mean over prompts with its bootstrap interval; None where no prompt is left."""
        return self.ratio().interval() if self.values else None

    def ratio(self) -> Ratio:
        """The same over all prompts."""
        above, below = np.zeros((2, len(self.values) + self.left_out))
        above[list(self.prompts)], below[list(self.prompts)] = self.values, 1.0
        return Ratio(above, below)


def per_prompt(values: Sequence[float | None]) -> PerPrompt:
    """[P] values of all prompts, None where not defined."""
    present = [(i, value) for i, value in enumerate(values) if value is not None]
    return PerPrompt(
        tuple(float(value) for _, value in present),
        tuple(i for i, _ in present),
        len(values) - len(present),
    )


def column(rows: Sequence[Sequence[float] | None], i: int) -> PerPrompt:
    """The ``i``-th of several values of each of [P] prompts, None where not defined."""
    return per_prompt([None if row is None else row[i] for row in rows])


@dataclass(frozen=True)
class Rouge:
    """ROUGE F-measures, 0 to 100."""

    rouge1: PerPrompt
    rouge2: PerPrompt
    rougeL: PerPrompt


def rouge(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> Rouge:
    """ROUGE-1, -2 and -L (Lin 2004) by the rouge_score package with its Porter stemmer.

    Args:
        predictions: [P] the samples of each prompt, at least one.
        references: [P] the reference texts of each prompt, or none.

    A sample's score is that with the best of the references, for each variant apart (rouge_score's
    ``score_multi``); a prompt's the mean over its samples. A sample without words has 0. A
    reference without words (to ROUGE: runs of a-z and 0-9) is none; a prompt without any is left
    out.
    """
    from rouge_score.rouge_scorer import RougeScorer  # a second, which a run need not wait for
    from rouge_score.tokenizers import DefaultTokenizer

    scorer = RougeScorer(list(ROUGE), use_stemmer=True)
    words = DefaultTokenizer(use_stemmer=True).tokenize
    rows: list[list[float] | None] = []
    for samples, texts in zip(predictions, references, strict=True):
        usable = [text for text in texts if words(text)]
        scores = [scorer.score_multi(usable, sample) for sample in samples] if usable else []
        rows.append(
            [100 * _mean([s[kind].fmeasure for s in scores]) for kind in ROUGE] if usable else None
        )
    return Rouge(*(column(rows, i) for i in range(len(ROUGE))))


def self_bleu(samples: Sequence[Sequence[str]]) -> PerPrompt:
    """Self-BLEU (Zhu et al. 2018), 0 to 100: BLEU of each sample against the other samples of the
    same prompt, mean over samples. Sentence BLEU by sacrebleu: up to 4-grams, as far as a text has
    them (effective order), 13a tokens, exponential smoothing.

    Args:
        samples: [P] texts of each prompt. A prompt with one sample is left out.
    """
    from sacrebleu.metrics.bleu import BLEU

    bleu = BLEU(effective_order=True)

    def score(texts: Sequence[str], i: int) -> float:
        return float(bleu.sentence_score(texts[i], [*texts[:i], *texts[i + 1 :]]).score)

    return per_prompt(
        [
            _mean([score(texts, i) for i in range(len(texts))]) if len(texts) > 1 else None
            for texts in samples
        ]
    )


def distinct(completions: Sequence[Sequence[int]], n: int) -> float | None:
    """distinct-n (Li et al. 2016), 0 to 1: different n-grams over all n-grams of all completions,
    in token ids; none reaches over two completions. None where all are shorter than n.

    Args:
        completions: token ids, without the token that ends them (:func:`without_eos`).
    """
    grams = [tuple(ids[i : i + n]) for ids in completions for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def without_eos(rollout: Rollout) -> tuple[int, ...]:
    """The completion's token ids without the end-of-sequence token."""
    ids = rollout.completion_ids
    return ids[:-1] if rollout.finish_reason == "stop" else ids


def repeated(rollouts: Sequence[Sequence[Rollout]]) -> PerPrompt:
    """:func:`seqkd.evaluation.text.repetition` (4-grams, 0 to 1) of the completions of each prompt.

    Args:
        rollouts: [P] the completions of each prompt. A prompt whose completions are all shorter
            than 4 tokens is left out.
    """
    return per_prompt(
        [
            repetition(group) if any(len(r.completion_ids) >= 4 for r in group) else None
            for group in rollouts
        ]
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def repetition(rollouts: Sequence[Rollout], n: int = 4) -> float:
    """Share of the completions' n-grams that occurred before in the same completion; 0 where all
    are shorter."""
    seen = repeated = 0
    for rollout in rollouts:
        ids = rollout.completion_ids
        grams = [ids[i : i + n] for i in range(len(ids) - n + 1)]
        seen += len(grams)
        repeated += len(grams) - len(set(grams))
    return repeated / seen if seen else 0.0
