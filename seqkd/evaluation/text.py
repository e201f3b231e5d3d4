"""Text metrics: similarity of samples to reference texts, diversity and repetition.

Definitions, sources and limitations of each metric: docs/evaluation.md.
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
    """Metric at the D prompts where it is defined, in the order of the prompts."""

    values: tuple[float, ...]
    """[D] mean over the samples of each prompt."""
    prompts: tuple[int, ...]
    """[D] indices of these prompts."""
    left_out: int
    """Number of prompts where the metric is undefined."""

    def interval(self) -> Interval | None:
        """Return the mean over prompts with its interval; None if the metric is undefined
        at every prompt."""
        return self.ratio().interval() if self.values else None

    def ratio(self) -> Ratio:
        """Return the metric as a ratio over all prompts."""
        above, below = np.zeros((2, len(self.values) + self.left_out))
        above[list(self.prompts)], below[list(self.prompts)] = self.values, 1.0
        return Ratio(above, below)


def per_prompt(values: Sequence[float | None]) -> PerPrompt:
    """Convert [P] values of all prompts, None where the metric is undefined."""
    present = [(i, value) for i, value in enumerate(values) if value is not None]
    return PerPrompt(
        tuple(float(value) for _, value in present),
        tuple(i for i, _ in present),
        len(values) - len(present),
    )


def column(rows: Sequence[Sequence[float] | None], i: int) -> PerPrompt:
    """Convert the ``i``-th value of each of [P] rows, None where the metrics are undefined."""
    return per_prompt([None if row is None else row[i] for row in rows])


@dataclass(frozen=True)
class Rouge:
    """ROUGE F-measures, 0 to 100."""

    rouge1: PerPrompt
    rouge2: PerPrompt
    rougeL: PerPrompt


def rouge(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> Rouge:
    """Compute ROUGE-1, -2 and -L (Lin 2004) with the rouge_score package and its Porter stemmer.

    Args:
        predictions: [P] samples of each prompt, at least one.
        references: [P] reference texts of each prompt, possibly none.

    Each sample is scored against the best reference, separately for each variant (rouge_score's
    ``score_multi``). The score of a prompt is the mean over its samples. A sample without words
    scores 0. References without words (in ROUGE, runs of a-z and 0-9) are ignored, and prompts
    without references are skipped.
    """
    from rouge_score.rouge_scorer import RougeScorer  # takes a second, so imported only if used
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
    """Compute Self-BLEU (Zhu et al. 2018), 0 to 100: the BLEU of each sample against the other
    samples of the same prompt, averaged over samples. Sentence BLEU by sacrebleu: up to 4-grams, or
    fewer for shorter texts (effective order), 13a tokenization, exponential smoothing.

    Args:
        samples: [P] texts of each prompt. Prompts with one sample are skipped.
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
    """Compute distinct-n (Li et al. 2016), 0 to 1: the number of distinct n-grams of token ids over
    the number of all n-grams, within completions. None if all completions are shorter than n.

    Args:
        completions: token ids without the end-of-sequence token (:func:`without_eos`).
    """
    grams = [tuple(ids[i : i + n]) for ids in completions for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def without_eos(rollout: Rollout) -> tuple[int, ...]:
    """Return the completion's token ids without the end-of-sequence token."""
    ids = rollout.completion_ids
    return ids[:-1] if rollout.finish_reason == "stop" else ids


def repeated(rollouts: Sequence[Sequence[Rollout]]) -> PerPrompt:
    """Compute :func:`repetition` (4-grams, 0 to 1) of the completions of each prompt.

    Args:
        rollouts: [P] completions of each prompt. Prompts whose completions are all shorter than 4
            tokens are skipped.
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
    """Compute the share of n-grams that occurred earlier in the same completion; 0 if all
    completions are shorter than n."""
    seen = repeated = 0
    for rollout in rollouts:
        ids = rollout.completion_ids
        grams = [ids[i : i + n] for i in range(len(ids) - n + 1)]
        seen += len(grams)
        repeated += len(grams) - len(set(grams))
    return repeated / seen if seen else 0.0
