"""Interfaces of the sampler, the teacher and the learner that the training loop uses. They are
independent of the processes that implement them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from seqkd.config.phases import TermConfig
from seqkd.types import Counts, Prompt, Rollout, StepResult, TeacherScore, WeightVersion

Scores = Mapping[str, TeacherScore]
"""Teacher scores by sample id. Empty if no teacher is needed."""

Finished = Callable[[int, Rollout], None]
"""Callback that receives the index of a prompt and a completed rollout of that prompt."""


Seed = int | Sequence[int]
"""Seed of a call, from which each prompt gets its own seed by its position; or one seed per prompt,
so that the completions of a prompt do not depend on the other prompts."""


class Sampler(Protocol):
    """A model that samples: engines with the same weights, or an endpoint."""

    def sample(
        self,
        prompts: Sequence[Prompt],
        samples: Sequence[int],
        seed: Seed,
        temperature: float = 1.0,
        top_p: float = 1.0,
        finished: Finished | None = None,
    ) -> list[Rollout]:
        """Sample ``samples[i]`` completions of prompt i.

        Returns the completions ordered by prompt. The result depends only on the seed, the weights
        and the other arguments. ``finished`` may be called with every completion as soon as it is
        complete, in any order.
        """

    def usage(self) -> dict[str, int]:
        """Return the usage of a paid endpoint so far. Empty for an engine."""


class StudentSampler(Sampler, Protocol):
    """The student's sampler, whose weights change during training."""

    @property
    def policy_version(self) -> int | None:
        """Version of the loaded weights. None if it is unknown."""

    def load(self, version: WeightVersion) -> None:
        """Load published weights and verify them."""

    def mark_stale(self) -> None:
        """Mark the loaded weights as different from the learner's, so that the next sync replaces
        them."""

    def logprobs(self, token_ids: Sequence[int]) -> list[list[float]]:
        """Return one list per engine: the log-probability of each of ``token_ids[1:]`` given the
        tokens before it."""


class Teacher(Protocol):
    """A frozen model that scores completions."""

    def score(self, rollouts: Sequence[Rollout]) -> dict[str, TeacherScore]:
        """Return a score for every rollout, by sample id."""

    def usage(self) -> dict[str, int]:
        """Return the usage of a paid endpoint so far. Empty for a local model."""


@dataclass(frozen=True)
class Part:
    """The part of a training step that uses the completions of one sampler."""

    rollouts: Sequence[Rollout]
    scores: Scores
    counts: Counts
    terms: tuple[TermConfig, ...]
    teacher_fraction: float | None = None
    """Share of teacher samples in a mixture, whose sequences are weighted. None for all other
    samplers."""
    usage: Mapping[str, int] = field(default_factory=dict)
    """Usage of the teacher's endpoint so far."""
    masked: Sequence[Rollout] = ()
    """Completions of the same draw that are excluded from the loss because they were truncated."""
    skipped: int = 0
    """Number of completions of the same draw that an endpoint refused to write or to score."""


Measured = dict[str, dict[str, list[float]]]
"""Statistics by sample id and name, one number per completion token. Which statistics are available
depends on the scores."""


class Learner(Protocol):
    """The student's weights and its optimizer. Every method raises LearnerLost if a learner process
    is lost."""

    policy_version: int
    is_consistent: bool
    """True between two steps, when the learner may be saved."""

    def step(self, parts: Sequence[Part], lr: float) -> StepResult:
        """Take one optimizer step on the sum of all parts and return global results.

        If the loss or the gradient is not finite, the step counts, but neither the weights nor the
        optimizer state change.
        """

    def measure(
        self, rollouts: Sequence[Rollout], scores: Scores, ends: tuple[int, ...] = ()
    ) -> Measured:
        """Compute the student's statistics on ``rollouts`` without a training step.

        ``ends`` are token ids that end a completion. If they are passed, the result includes
        "end_logprob", the log-probability of any of them at each state.
        """

    def publish(self) -> WeightVersion:
        """Make the current weights available to samplers."""

    def export(self, directory: str) -> None:
        """Write a model directory that transformers and vLLM load."""

    def restart(self) -> None:
        """Start new processes with the initial student."""

    def save(self, directory: str) -> None:
        """Write weights and optimizer state into an existing directory. The files are on disk when
        this returns."""

    def restore(self, directory: str, policy_version: int) -> None:
        """Restore the exact state that :meth:`save` wrote after ``policy_version`` steps. The
        number of ranks, the ZeRO stage and the precision may differ.

        Raises:
            ModelError: The checkpoint belongs to another student.
        """
