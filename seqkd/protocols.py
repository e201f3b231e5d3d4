"""What the loop needs of a sampler, a teacher and a learner, whatever processes are behind them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from seqkd.config.phases import TermConfig
from seqkd.types import Counts, Prompt, Rollout, StepResult, TeacherScore, WeightVersion

Scores = Mapping[str, TeacherScore]
"""Teacher scores by sample id; empty where no teacher is needed."""

Finished = Callable[[Rollout], None]
"""Is told of a completion."""


class Sampler(Protocol):
    """Engines that hold one set of weights, or an endpoint in their place."""

    def sample(
        self,
        prompts: Sequence[Prompt],
        samples: Sequence[int],
        seed: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        finished: Finished | None = None,
    ) -> list[Rollout]:
        """``samples[i]`` completions of prompt i, prompt by prompt; the same for the same seed and
        weights. ``finished`` may be told of each as soon as it is there, in any order."""

    def usage(self) -> dict[str, int]:
        """What was asked of a paid endpoint so far; nothing of an engine."""


class StudentSampler(Sampler, Protocol):
    """The student's, whose weights change."""

    @property
    def policy_version(self) -> int | None:
        """Of the weights it has; None where that is not known."""

    def load(self, version: WeightVersion) -> None:
        """Take in published weights, verified."""

    def mark_stale(self) -> None:
        """Whatever weights it has, they are not the learner's."""

    def logprobs(self, token_ids: Sequence[int]) -> list[list[float]]:
        """The log-probability of each of ``token_ids[1:]`` after those before it: a list for every
        engine."""


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
    terms: tuple[TermConfig, ...]
    teacher_fraction: float | None = None
    """The share of teacher samples in a mixture, whose sequences are weighted; else None."""
    usage: Mapping[str, int] = field(default_factory=dict)
    """What the teacher's endpoint was asked for so far."""
    masked: Sequence[Rollout] = ()
    """Completions that were drawn with these and left out, because they are cut."""


Measured = dict[str, dict[str, list[float]]]
"""By sample id: every statistic that the score allows, a number a completion token."""


class Learner(Protocol):
    """The student's weights and its optimizer. What is asked of it raises LearnerLost where one of
    its processes is lost."""

    policy_version: int
    is_consistent: bool
    """Whether it stands between two steps, so that it may be saved."""

    def step(self, parts: Sequence[Part], lr: float) -> StepResult:
        """One optimizer step on the sum of all parts; results are global. Where loss or gradient is
        not finite the step counts, but changes neither weights nor optimizer."""

    def measure(
        self, rollouts: Sequence[Rollout], scores: Scores, ends: tuple[int, ...] = ()
    ) -> Measured:
        """What the student thinks of ``rollouts``; no step is taken. With ``ends``, token ids that
        end a completion, also "end_logprob", the log-probability of any of them at each state."""

    def publish(self) -> WeightVersion:
        """Make the current weights available to samplers."""

    def export(self, directory: str) -> None:
        """Write a model directory that transformers and vLLM load."""

    def restart(self) -> None:
        """New processes, with the initial student."""

    def save(self, directory: str) -> None:
        """Write weights and optimizer state into an existing directory, as files that are on disk
        when this returns."""

    def restore(self, directory: str, policy_version: int) -> None:
        """Go on exactly from what :meth:`save` wrote after ``policy_version`` steps, whatever the
        number of ranks, the ZeRO stage and the precision; ModelError where it is of another
        student."""
