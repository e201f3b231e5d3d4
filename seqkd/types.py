"""The records that cross a boundary between processes or modules.

Axis names: B sequences of a micro-batch, S tokens of a padded prompt + completion, T tokens of a
padded completion, N real completion tokens of a micro-batch (``loss_mask.sum()``), H hidden size,
V vocabulary. Log-probabilities are natural logarithms; divergences are in nats.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

Source = Literal["student", "teacher", "dataset"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt, rendered and tokenised as the student will see it."""

    prompt_id: str
    """Stable identity: a hash of ``token_ids``."""
    token_ids: tuple[int, ...]
    text: str
    """The user's words, for reports."""
    reference_ids: tuple[int, ...] | None = None
    """Tokens of the data set's own answer, end-of-sequence included; None where it has none."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled (or given) completion of one prompt."""

    prompt_id: str
    sample_id: str
    """Unique within a run: ``<prompt_id>/<seed>/<index>``."""
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    """At least one token; ends with the end-of-sequence token unless ``finish_reason`` is
    "length"."""
    rollout_logprobs: tuple[float, ...] | None
    """``rollout_logprobs[t]`` is the log-probability of ``completion_ids[t]`` under the
    distribution that really drew it; None for completions taken from a data set."""
    source: Source
    policy_version: int
    """Number of weight syncs the sampling engine had received (0: initial weights)."""
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class TeacherScore:
    """What a teacher says about one rollout. Exactly one of the two fields is set."""

    sample_id: str
    hidden: Tensor | None = None
    """[T, H] last hidden states (after the final norm) at the states *before* each completion
    token; with the teacher's output head they are its whole next-token distribution."""
    logprobs: Tensor | None = None
    """[T] float32 log-probability of each completion token."""


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """One micro-batch of one learner rank. The samples of a prompt are never split."""

    input_ids: Tensor
    """[B, S] long, right-padded prompt + completion."""
    attention_mask: Tensor
    """[B, S] long, 1 on real tokens."""
    state_index: Tensor
    """[B, T] long, the position in S whose hidden state predicts completion token t."""
    target_ids: Tensor
    """[B, T] long, completion tokens (0 on padding)."""
    loss_mask: Tensor
    """[B, T] bool, True on completion tokens."""
    group: Tensor
    """[B] long, equal for samples of the same prompt."""
    rollout_logprobs: Tensor | None
    """[B, T] float32, 0 on padding; None for completions that were not sampled."""
    source: Source
    """Who wrote the completions of this micro-batch."""
    teacher_hidden: Tensor | None = None
    """[N, H] teacher states in the order of ``loss_mask.nonzero()``."""
    teacher_logprobs: Tensor | None = None
    """[B, T] float32, 0 on padding."""


@dataclass(frozen=True, slots=True)
class Counts:
    """What a loss divides by, and what it compares with: constants of the optimizer step, equal
    on every rank and micro-batch, so that splitting a batch never changes a gradient."""

    sequences: float
    """Sequences in the whole step."""
    tokens: float
    """Completion tokens in the whole step."""
    rate: float = 0.0
    """Estimate of J = E[sum_t KL_t] / E[L] in nats per token, from data independent of the
    batch (but for the first step of a phase, see :mod:`seqkd.rate`)."""
    length: float = 1.0
    """Estimate of E[L] in tokens, likewise."""


@dataclass(frozen=True, slots=True)
class TokenStats:
    """Per-token quantities of a micro-batch, all [B, T]; 0 on padding. A field is None unless an
    objective asked for it. Differentiable in the student."""

    loss_mask: Tensor
    """[B, T] bool."""
    group: Tensor
    """[B] long."""
    student_logprob: Tensor | None = None
    """log q(y_t | s_t)."""
    teacher_logprob: Tensor | None = None
    """log p(y_t | s_t); no gradient."""
    reverse_kl: Tensor | None = None
    """sum_v q(v|s_t) log q(v|s_t)/p(v|s_t), exact over the vocabulary."""
    forward_kl: Tensor | None = None
    """sum_v p(v|s_t) log p(v|s_t)/q(v|s_t), exact over the vocabulary."""
    entropy: Tensor | None = None
    """-sum_v q log q of the student."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer step reports: global over ranks and micro-batches."""

    loss: float
    """The surrogate that was minimised. Its gradient means something, its value need not."""
    grad_norm: float
    """L2 norm before clipping."""
    sums: dict[str, float] = field(default_factory=dict)
    """Sums over completion tokens of every monitored statistic, plus "tokens", "sequences" and
    "logprob_gap", the absolute difference between the sampler's log-probs and those of the same
    model here."""
    logprob_gap_max: float = 0.0
    """The largest such difference."""

    def per_token(self, name: str) -> float | None:
        """Mean of a monitored statistic over completion tokens; None if not monitored."""
        return self.sums[name] / self.sums["tokens"] if name in self.sums else None


@dataclass(frozen=True, slots=True)
class WeightVersion:
    """A set of student weights published by the learner."""

    policy_version: int
    path: str
    """Directory with ``model.safetensors`` on the publishing node."""
    node_id: str
    digests: dict[str, str]
    """xxh3-128 of each tensor's bytes, by parameter name."""
