"""Held-out divergences between student and teacher, with intervals over prompts.

Reverse KL is measured on the student's samples and forward KL on the teacher's, both as the sum
over a sequence of the exact divergence over the vocabulary at each state (Rao-Blackwellised: the
same mean as the sampled log-ratio, with less variance).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from seqkd.evaluation.intervals import Array, Interval, Ratio
from seqkd.protocols import Measured, Scores
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
"""What is reported, as a ratio of two sums. ``nll`` is -log q of the teacher's text: the forward KL
up to the teacher's entropy, known for every teacher that writes. ``teacher_nll`` is -log p of the
student's: how likely the teacher finds it."""
TEACHER_FIGURES = {"student_length": "teacher_length", "student_eos_rate": "teacher_eos_rate"}
"""Figures of the student's completions, with those of the teacher's that they should match."""


@dataclass(frozen=True)
class Example:
    """A completion for people to read, and what each of its tokens costs."""

    rollout: Rollout
    costs: tuple[float, ...] = ()
    """Reverse KL at each token's state, of the teacher's text forward KL; empty where the teacher's
    distribution is not known."""


@dataclass(frozen=True)
class Answers:
    """All that one model wrote, and what the student thinks of it."""

    rollouts: list[Rollout]
    measured: Measured
    """Divergences only where the teacher's distribution is known."""


@dataclass(frozen=True)
class Measurement:
    """Sums over the samples of each prompt, [P] each: P prompts in a fixed order."""

    sums: dict[str, Array]
    """By the names that :data:`FIGURES` uses; divergences only where the teacher's distribution is
    known."""
    student: tuple[Example, ...]
    """The first sample of each of the first prompts."""
    teacher: tuple[Example, ...]

    def ratios(self) -> dict[str, Ratio]:
        """Every figure that is known (nats, tokens, shares), prompt by prompt."""
        return {
            figure: Ratio(self.sums[above], self.sums[below])
            for figure, (above, below) in FIGURES.items()
            if above in self.sums
        }

    def table(self) -> dict[str, Interval]:
        """The same over all prompts."""
        return {figure: ratio.interval() for figure, ratio in self.ratios().items()}


class HeldOut:
    """Measures the student on fixed prompts; the teacher writes and scores its own answers once."""

    def __init__(
        self, workers: Workers, prompts: Sequence[Prompt], samples: int, seed: int, shown: int = 0
    ) -> None:
        """``shown``: prompts whose first completions are kept for people to read."""
        self.workers, self.prompts, self.seed, self.shown = workers, prompts, seed, shown
        self.samples = [samples] * len(prompts)
        self.teacher_rollouts = workers.teacher_sampler.sample(prompts, self.samples, seed)
        scores = self._scores(self.teacher_rollouts)
        # Copied: what is read in place takes room in Ray's object store for as long as it is held.
        self.teacher_scores = {i: score.map_tensors(Tensor.clone) for i, score in scores.items()}

    def measure(self) -> Measurement:
        """The student as it is now; the same random numbers every time."""
        return aggregate_by_prompt(self.prompts, *self.answers(), self.shown)

    def answers(self, ends: tuple[int, ...] = ()) -> tuple[Answers, Answers]:
        """The student's own and the teacher's; ``ends`` as in :class:`seqkd.protocols.Learner`."""
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


def aggregate_by_prompt(
    prompts: Sequence[Prompt], student: Answers, teacher: Answers, shown: int = 0
) -> Measurement:
    """All samples, as many of the one as of the other, to sums over those of each prompt; of the
    first ``shown`` prompts the first samples are kept."""

    def sums(answers: Answers, values: dict[str, float]) -> Array:
        """[P] of ``values`` by sample id."""
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
    """Sum over each completion's tokens, by sample id; empty where it is not known."""
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
