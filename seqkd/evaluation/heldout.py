"""Held-out divergences between student and teacher, with intervals over prompts.

Reverse KL is measured on the student's samples and forward KL on the teacher's samples. Both are
sums over a sequence of the exact divergence over the vocabulary at each state (Rao-Blackwellized:
the same mean as the sampled log-ratio, with less variance).

All samples are drawn at temperature 1 and top-p 1, because both divergences are expectations under
the model's own distribution. ``rollout.temperature`` and ``rollout.top_p`` apply to training only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from seqkd.evaluation.intervals import Array, Interval, Ratio
from seqkd.protocols import Measured, Scores, Seed
from seqkd.types import Prompt, Rollout
from seqkd.workers import Workers

FIGURES: dict[str, tuple[str, str]] = {
    "reverse_kl_per_token": ("reverse_kl", "student_tokens"),
    "reverse_kl_per_sequence": ("reverse_kl", "sequences"),
    "forward_kl_per_token": ("forward_kl", "teacher_tokens"),
    "forward_kl_per_sequence": ("forward_kl", "sequences"),
    "nll_per_token": ("nll", "teacher_tokens"),
    "teacher_nll_per_token": ("teacher_nll", "student_tokens"),
    "student_length": ("student_tokens", "sequences"),
    "teacher_length": ("teacher_tokens", "sequences"),
    "student_eos_rate": ("student_ended", "sequences"),
    "teacher_eos_rate": ("teacher_ended", "sequences"),
}
"""Reported figures as ratios of two sums. ``nll`` is -log q of the teacher's text: the forward KL
up to the teacher's entropy, available for every teacher that generates text. ``teacher_nll`` is
-log p of the student's text."""
TEACHER_FIGURES = {"student_length": "teacher_length", "student_eos_rate": "teacher_eos_rate"}
"""Figures of the student's completions, with the teacher's figures that they should match."""


@dataclass(frozen=True)
class Example:
    """Completion for display, with the divergence of each token."""

    rollout: Rollout
    costs: tuple[float, ...] = ()
    """Reverse KL at each token's state for the student's text, forward KL for the teacher's; empty
    if the teacher's distribution is unknown."""


@dataclass(frozen=True)
class Answers:
    """All completions of one model, with the student's measurements on them."""

    rollouts: list[Rollout]
    measured: Measured
    """Measurements; divergences only if the teacher's distribution is known."""


@dataclass(frozen=True)
class Measurement:
    """Sums over the samples of each of P prompts, in a fixed order."""

    sums: dict[str, Array]
    """[P] sums by the names used in :data:`FIGURES`; divergences only if the teacher's distribution
    is known."""
    student: tuple[Example, ...]
    """Student's first sample of each of the first prompts."""
    teacher: tuple[Example, ...]
    """Teacher's first sample of each of the first prompts."""

    def ratios(self) -> dict[str, Ratio]:
        """Return every available figure (nats, tokens, shares) with its sums per prompt."""
        return {
            figure: Ratio(self.sums[above], self.sums[below])
            for figure, (above, below) in FIGURES.items()
            if above in self.sums
        }

    def table(self) -> dict[str, Interval]:
        """Return every available figure over all prompts."""
        return {figure: ratio.interval() for figure, ratio in self.ratios().items()}


class HeldOut:
    """Measurement of the student on fixed prompts. The teacher's completions are sampled and scored
    once."""

    def __init__(
        self, workers: Workers, prompts: Sequence[Prompt], samples: int, seed: Seed, shown: int = 0
    ) -> None:
        """Sample and score the teacher's completions. The first completions of the first ``shown``
        prompts are kept for display."""
        self.workers, self.prompts, self.seed, self.shown = workers, prompts, seed, shown
        self.samples = [samples] * len(prompts)
        self.teacher_rollouts = workers.teacher_sampler.sample(prompts, self.samples, seed)
        scores = self._scores(self.teacher_rollouts)
        # Copied, because tensors that are read in place occupy Ray's object store until released.
        self.teacher_scores = {i: score.map_tensors(Tensor.clone) for i, score in scores.items()}

    def measure(self) -> Measurement:
        """Measure the current student, with the same random numbers at every call."""
        return aggregate_by_prompt(self.prompts, *self.answers(), self.shown)

    def answers(self, ends: tuple[int, ...] = ()) -> tuple[Answers, Answers]:
        """Return the completions of the student and of the teacher; ``ends`` as in
        :meth:`seqkd.protocols.Learner.measure`."""
        self.workers.sync()
        rollouts = self.workers.student.sample(self.prompts, self.samples, self.seed)
        scored = self.workers.distribution and self.workers.live_teacher
        scores = self._scores(rollouts) if scored else {}
        measure = self.workers.learner.measure
        return (
            Answers(rollouts, measure(rollouts, scores, ends)),
            Answers(
                self.teacher_rollouts,
                measure(self.teacher_rollouts, self.teacher_scores, ends),
            ),
        )

    def _scores(self, rollouts: Sequence[Rollout]) -> Scores:
        return self.workers.teacher.score(rollouts) if self.workers.distribution else {}


def prompt_seeds(prompts: Sequence[Prompt], seed: int) -> list[int]:
    """Return a sampling seed for each prompt, which does not depend on the other prompts."""
    texts = (f"{seed}/{prompt.prompt_id}".encode() for prompt in prompts)
    return [int.from_bytes(hashlib.blake2b(text, digest_size=6).digest()) for text in texts]


def aggregate_by_prompt(
    prompts: Sequence[Prompt], student: Answers, teacher: Answers, shown: int = 0
) -> Measurement:
    """Sum all measurements over the samples of each prompt. Student and teacher must have the same
    number of samples. The first samples of the first ``shown`` prompts are kept for display."""

    def sums(answers: Answers, values: dict[str, float]) -> Array:
        """Return [P] sums of ``values``, which are by sample id."""
        totals = dict.fromkeys((p.prompt_id for p in prompts), 0.0)
        for rollout in answers.rollouts:
            totals[rollout.prompt_id] += values[rollout.sample_id]
        return np.array(list(totals.values()))

    columns = {"sequences": sums(student, {r.sample_id: 1.0 for r in student.rollouts})}
    for who, answers in (("student", student), ("teacher", teacher)):
        columns[f"{who}_tokens"] = sums(answers, _lengths(answers))
        columns[f"{who}_ended"] = sums(answers, _ended(answers))
    columns["nll"] = -sums(teacher, totals(teacher, "student_logprob"))
    if per_sample := totals(student, "teacher_logprob"):
        columns["teacher_nll"] = -sums(student, per_sample)
    if per_sample := totals(student, "reverse_kl"):
        columns["reverse_kl"] = sums(student, per_sample)
    if per_sample := totals(teacher, "forward_kl"):
        columns["forward_kl"] = sums(teacher, per_sample)
    first = prompts[:shown]
    return Measurement(
        columns, _first(first, student, "reverse_kl"), _first(first, teacher, "forward_kl")
    )


def totals(answers: Answers, name: str) -> dict[str, float]:
    """Return the sum of a statistic over each completion's tokens, by sample id; empty if the
    statistic is unavailable."""
    return {
        sample_id: sum(values[name])
        for sample_id, values in answers.measured.items()
        if name in values
    }


def _first(prompts: Sequence[Prompt], answers: Answers, cost: str) -> tuple[Example, ...]:
    by_prompt = {r.prompt_id: r for r in reversed(answers.rollouts)}
    first = [by_prompt[p.prompt_id] for p in prompts]
    return tuple(Example(r, tuple(answers.measured[r.sample_id].get(cost, ()))) for r in first)


def _lengths(answers: Answers) -> dict[str, float]:
    return {r.sample_id: float(len(r.completion_ids)) for r in answers.rollouts}


def _ended(answers: Answers) -> dict[str, float]:
    return {r.sample_id: float(r.finish_reason == "stop") for r in answers.rollouts}
