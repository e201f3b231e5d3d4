"""What the loop needs of a sampler, a teacher and a learner, whatever processes are behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from seqkd.config import Objective
from seqkd.types import Counts, Prompt, Rollout, StepResult, TeacherScore, WeightVersion

Scores = Mapping[str, TeacherScore]
"""Teacher scores by sample id; empty where no teacher is needed."""


class Sampler(Protocol):
    """Engines that hold one set of weights."""

    policy_version: int

    def sample(
        self,
        prompts: Sequence[Prompt],
        samples: int,
        seed: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> list[Rollout]:
        """``samples`` completions of each prompt, the same for the same seed and weights."""

    def load(self, version: WeightVersion) -> None:
        """Take in published weights, verified."""


class Teacher(Protocol):
    """A frozen model that scores."""

    def score(self, rollouts: Sequence[Rollout]) -> dict[str, TeacherScore]:
        """A score for every rollout, by sample id."""


class Learner(Protocol):
    """The student's weights and its optimizer."""

    policy_version: int

    def step(
        self,
        rollouts: Sequence[Rollout],
        scores: Scores,
        counts: Counts,
        objective: Objective,
        lr: float,
    ) -> StepResult:
        """One optimizer step; sums are global."""

    def measure(self, rollouts: Sequence[Rollout], scores: Scores) -> dict[str, dict[str, float]]:
        """Sums over each sequence's tokens of every statistic, by sample id; no step is taken."""

    def publish(self) -> WeightVersion:
        """Make the current weights available to samplers."""

    def export(self, directory: str) -> None:
        """Write a model directory that transformers and vLLM load."""


@dataclass
class Workers:
    """Everything that the loop drives."""

    student: Sampler
    teacher: Teacher
    learner: Learner
    teacher_sampler: Sampler

    def sync(self) -> None:
        """Bring the student's sampler to the learner's weights; nothing to do where it has them."""
        if self.student.policy_version != self.learner.policy_version:
            self.student.load(self.learner.publish())
