"""What the loop needs of a sampler, a teacher and a learner, whatever processes are behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from seqkd.config import Term
from seqkd.types import Counts, Prompt, Rollout, StepResult, TeacherScore, WeightVersion

Scores = Mapping[str, TeacherScore]
"""Teacher scores by sample id; empty where no teacher is needed."""


class Sampler(Protocol):
    """Engines that hold one set of weights, or an endpoint in their place."""

    def sample(
        self,
        prompts: Sequence[Prompt],
        samples: Sequence[int],
        seed: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> list[Rollout]:
        """``samples[i]`` completions of prompt i, prompt by prompt; the same for the same seed and
        weights."""

    def usage(self) -> dict[str, int]:
        """What was asked of a paid endpoint so far; nothing of an engine."""


class StudentSampler(Sampler, Protocol):
    """The student's, whose weights change."""

    policy_version: int

    def load(self, version: WeightVersion) -> None:
        """Take in published weights, verified."""


class Teacher(Protocol):
    """A frozen model that scores."""

    def score(self, rollouts: Sequence[Rollout]) -> dict[str, TeacherScore]:
        """A score for every rollout, by sample id."""

    def usage(self) -> dict[str, int]:
        """What was asked of a paid endpoint so far; nothing of a local model."""


@dataclass(frozen=True)
class Part:
    """What one step learns from the completions of one sampler."""

    rollouts: Sequence[Rollout]
    scores: Scores
    counts: Counts
    terms: tuple[Term, ...]
    teacher_fraction: float | None = None
    """The share of teacher samples in a mixture, whose sequences are weighted; else None."""
    usage: Mapping[str, int] = field(default_factory=dict)
    """What the teacher's endpoint was asked for so far."""


Measured = dict[str, dict[str, list[float]]]
"""By sample id: every statistic that the score allows, a number a completion token."""


class Learner(Protocol):
    """The student's weights and its optimizer."""

    policy_version: int

    def step(self, parts: Sequence[Part], lr: float) -> StepResult:
        """One optimizer step on the sum of all parts; results are global."""

    def measure(self, rollouts: Sequence[Rollout], scores: Scores) -> Measured:
        """What the student thinks of ``rollouts``; no step is taken."""

    def publish(self) -> WeightVersion:
        """Make the current weights available to samplers."""

    def export(self, directory: str) -> None:
        """Write a model directory that transformers and vLLM load."""
