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

from seqkd.errors import ModelError
from seqkd.evaluation.catalog import limits
from seqkd.evaluation.intervals import Array, Interval, Ratio
from seqkd.evaluation.tasks import ANSWERED, PREFIX, Tasks, with_tasks
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


def teacher_figure(name: str) -> str:
    """Return the teacher's figure that corresponds to a figure of the student's completions; empty
    if there is none."""
    return f"teacher_{name}" if name.startswith(PREFIX) else TEACHER_FIGURES.get(name, "")


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
        tasks = {name: (name, ANSWERED) for name in with_tasks((), self.sums)}
        return {
            figure: Ratio(self.sums[above], self.sums[below])
            for figure, (above, below) in (tasks | FIGURES).items()
            if above in self.sums
        }

    def table(self) -> dict[str, Interval]:
        """Return every available figure over all prompts."""
        ratios = self.ratios()
        return {name: ratio.interval().within(limits(name)) for name, ratio in ratios.items()}


class HeldOut:
    """Measurement of the student on fixed prompts. The teacher's completions are sampled and scored
    once."""

    def __init__(
        self,
        workers: Workers,
        prompts: Sequence[Prompt],
        samples: int,
        seed: Seed,
        shown: int = 0,
        tasks: Tasks | None = None,
    ) -> None:
        """Sample and score the teacher's completions. The first completions of the first ``shown``
        prompts are kept for display. Prompts that an endpoint refuses are removed from
        ``prompts``."""
        self.workers, self.shown, self.tasks = workers, shown, tasks
        drawn = workers.teacher_sampler.sample(prompts, [samples] * len(prompts), seed)
        scores = self._scores([r for r in drawn if not r.refused])
        refused = _refused(drawn, scores)
        answered = [i for i, p in enumerate(prompts) if p.prompt_id not in refused]
        self.prompts = [prompts[i] for i in answered]
        self.seed = seed if isinstance(seed, int) else [seed[i] for i in answered]
        if not self.prompts:
            raise ModelError(
                f"teacher.on_refusal: the endpoint refused all {len(prompts)} held-out prompts. "
                "Check the endpoint, or evaluate on other prompts."
            )
        self.samples = [samples] * len(self.prompts)
        self.teacher_rollouts = [r for r in drawn if r.prompt_id not in refused]
        # Copied, because tensors that are read in place occupy Ray's object store until released.
        self.teacher_scores = {
            r.sample_id: scores[r.sample_id].map_tensors(Tensor.clone)
            for r in self.teacher_rollouts
            if r.sample_id in scores
        }

    def measure(self) -> Measurement:
        """Measure the current student, with the same random numbers at every call."""
        student, teacher = self.answers()
        measurement = aggregate_by_prompt(self.prompts, student, teacher, self.shown)
        if self.tasks is not None:
            texts = student.rollouts, teacher.rollouts
            measurement.sums.update(self.tasks.sums(self.prompts, *texts))
        return measurement

    def answers(self, ends: tuple[int, ...] = ()) -> tuple[Answers, Answers]:
        """Return the completions of the student and of the teacher; ``ends`` as in
        :meth:`seqkd.protocols.Learner.measure`."""
        self.workers.sync()
        rollouts = self.workers.student.sample(self.prompts, self.samples, self.seed)
        scored = self.workers.distribution and self.workers.live_teacher
        scores = self._scores(rollouts) if scored else {}
        # Both models lose the same prompts, so that they stay comparable.
        refused = _refused(rollouts, scores)
        student, teacher = (
            [r for r in all_ if r.prompt_id not in refused]
            for all_ in (rollouts, self.teacher_rollouts)
        )
        measure = self.workers.learner.measure
        return (
            Answers(student, measure(student, scores, ends)),
            Answers(teacher, measure(teacher, self.teacher_scores, ends)),
        )

    def _scores(self, rollouts: Sequence[Rollout]) -> Scores:
        return self.workers.teacher.score(rollouts) if self.workers.distribution else {}


def prompt_seeds(prompts: Sequence[Prompt], seed: int) -> list[int]:
    """Return a sampling seed for each prompt, which does not depend on the other prompts."""
    texts = (f"{seed}/{prompt.prompt_id}".encode() for prompt in prompts)
    return [int.from_bytes(hashlib.blake2b(text, digest_size=6).digest()) for text in texts]


def _refused(rollouts: Sequence[Rollout], scores: Scores) -> set[str]:
    """Return the ids of the prompts with a completion or score that an endpoint refused."""
    return {
        r.prompt_id
        for r in rollouts
        if r.refused or (r.sample_id in scores and scores[r.sample_id].refused)
    }


def aggregate_by_prompt(
    prompts: Sequence[Prompt], student: Answers, teacher: Answers, shown: int = 0
) -> Measurement:
    """Sum all measurements over the samples of each prompt. Student and teacher must have the same
    number of samples; all sums of a prompt without samples are 0. The first samples of the first
    ``shown`` prompts are kept for display."""

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
    none = {
        p.prompt_id: Rollout(p.prompt_id, "", p.token_ids, (), None, "teacher", 0, "refused")
        for p in prompts
    }
    by_prompt = none | {r.prompt_id: r for r in reversed(answers.rollouts)}
    first = [by_prompt[p.prompt_id] for p in prompts]
    measured = answers.measured
    return tuple(Example(r, tuple(measured.get(r.sample_id, {}).get(cost, ()))) for r in first)


def _lengths(answers: Answers) -> dict[str, float]:
    return {r.sample_id: float(len(r.completion_ids)) for r in answers.rollouts}


def _ended(answers: Answers) -> dict[str, float]:
    return {r.sample_id: float(r.finish_reason == "stop") for r in answers.rollouts}
