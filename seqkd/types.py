"""The records that cross a boundary between processes or modules.

Axis names: B sequences of a micro-batch in R rows, S tokens of a padded row, T tokens of a padded
completion, N real completion tokens of a micro-batch (``loss_mask.sum()``), H hidden size,
V vocabulary. Log-probabilities are natural logarithms; divergences are in nats.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

# torch has no read-only tensors, and says so whenever one is read in place (see TensorRecord).
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")

Source = Literal["student", "teacher", "dataset", "corpus"]


class Divergence(NamedTuple):
    """A divergence between the two next-token distributions of one state, with its options."""

    kind: str
    """A key of :data:`seqkd.objectives.DIVERGENCES`."""
    coefficient: float | None = None
    """beta of ``gjsd``, lambda of the skew divergences."""
    temperature: float = 1.0
    """Both distributions are softmax(logits / temperature), the divergence times its square."""


class EndLogprob(NamedTuple):
    """The log-probability that a completion ends at a state: of any of these tokens."""

    token_ids: tuple[int, ...]


Stat = str | Divergence | EndLogprob
"""The name of a per-token quantity: a field of :class:`TokenStats`, a divergence, or the end."""


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
    messages: tuple[tuple[str, str], ...] = ()
    """The same as (role, content), for a teacher that has a template of its own."""
    reference_cut: bool = False
    """Whether the answer was cut, so that it does not end with the end-of-sequence token."""
    tag: str = ""
    """What the data set calls it, such as a category; chooses one of several teachers."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled (or given) completion of one prompt."""

    prompt_id: str
    sample_id: str
    """Unique within a run: ``<prompt_id>/<source>/<seed>/<index>``."""
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
    tag: str = ""
    """Of the prompt."""


def rollout_from(values: Mapping[str, Any]) -> Rollout:
    """From plain data, as :func:`dataclasses.asdict` and then JSON or Arrow give it."""
    logprobs = values["rollout_logprobs"]
    tuples = {
        "prompt_ids": tuple(values["prompt_ids"]),
        "completion_ids": tuple(values["completion_ids"]),
        "rollout_logprobs": None if logprobs is None else tuple(logprobs),
    }
    return Rollout(**{**values, **tuples})


class TensorRecord:
    """A record whose tensors are pickled as arrays: their memory then goes beside the pickle
    (protocol 5), so that Ray copies it once, into its object store, and a process on the same node
    reads it there. There it is read-only: to write to such a tensor ends the process."""

    __slots__ = ()

    def __reduce__(self) -> tuple[Any, ...]:
        values = (getattr(self, f.name) for f in fields(self))  # type: ignore[arg-type]
        return _unpack_record, (
            type(self),
            *(_pack(v) if isinstance(v, Tensor) else v for v in values),
        )

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same with ``function`` applied to each tensor."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        tensors: dict[str, Any] = {
            n: function(v) for n, v in values.items() if isinstance(v, Tensor)
        }
        return replace(self, **tensors)  # type: ignore[type-var]


class _Packed(NamedTuple):
    bytes: np.ndarray
    dtype: torch.dtype
    shape: torch.Size


def _pack(tensor: Tensor) -> _Packed:
    flat = tensor.detach().cpu().contiguous().view(-1)
    return _Packed(flat.view(torch.uint8).numpy(), tensor.dtype, tensor.shape)


def _unpack_record(kind: type, *values: Any) -> Any:
    return kind(*(_unpack(v) if isinstance(v, _Packed) else v for v in values))


def _unpack(packed: _Packed) -> Tensor:
    return torch.from_numpy(packed.bytes).view(packed.dtype).view(packed.shape)


@dataclass(frozen=True, slots=True)
class TeacherScore(TensorRecord):
    """What a teacher says about one rollout: ``hidden``, or ``logprobs``, with or without the two
    ``top`` fields."""

    sample_id: str
    hidden: Tensor | None = None
    """[T, H] last hidden states (after the final norm) at the states *before* each completion
    token; with the teacher's output head they are its whole next-token distribution."""
    logprobs: Tensor | None = None
    """[T] float32 log-probability of each completion token."""
    top_ids: Tensor | None = None
    """[T, k] int32, the teacher's k most probable tokens at the state before each token."""
    top_logprobs: Tensor | None = None
    """[T, k + 1] float32, their log-probabilities; last the logarithm of what is left (the
    tail)."""
    teacher: str = ""
    """Which of several teachers gave it."""


@dataclass(frozen=True, slots=True)
class TrainBatch(TensorRecord):
    """One micro-batch of one learner rank. The samples of a prompt are never split."""

    input_ids: Tensor
    """[R, S] long, right-padded rows: a prompt and one completion, or those of all its samples."""
    attention_mask: Tensor
    """[R, S] long, 1 on real tokens."""
    position_ids: Tensor | None
    """[R, S] long, each token's position in its own sequence; None where that is its place in the
    row."""
    segment: Tensor | None
    """[R, S] long, 0 in a prompt, k in the k-th completion of a row, which sees the prompt and
    itself alone; None where every row is one sequence."""
    state_row: Tensor
    """[B] long, the row that a sequence is in."""
    state_index: Tensor
    """[B, T] long, the place in it whose hidden state predicts completion token t."""
    target_ids: Tensor
    """[B, T] long, completion tokens (0 on padding)."""
    loss_mask: Tensor
    """[B, T] bool, True on completion tokens."""
    group: Tensor
    """[B] long, equal for samples of the same prompt."""
    rollout_logprobs: Tensor | None
    """[B, T] float32, 0 on padding; None for completions that were not sampled."""
    by_teacher: Tensor
    """[B] bool, True where the teacher wrote the completion."""
    teacher_hidden: Tensor | None = None
    """[N, H] teacher states in the order of ``loss_mask.nonzero()``."""
    teacher_logprobs: Tensor | None = None
    """[B, T] float32, 0 on padding."""
    teacher_top_ids: Tensor | None = None
    """[N, k], in the order of ``teacher_hidden``."""
    teacher_top_logprobs: Tensor | None = None
    """[N, k + 1], likewise."""
    teacher: str = ""
    """Which of several teachers scored it: the same for every sequence."""
    sample_ids: tuple[str, ...] = ()
    """Of the B sequences; none of one that only fills an empty micro-batch."""


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
    batch (but for the first step of a phase, see :mod:`seqkd.learner.running_costs`)."""
    length: float = 1.0
    """Estimate of E[L] in tokens, likewise."""
    costs: Tensor | None = None
    """[T'] estimate of E[KL_t; the sequence has a token t], likewise, up to a common factor."""
    survival: Tensor | None = None
    """[T'] estimate of the probability that a sequence has a token t, times the same factor."""


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
    divergence: Tensor | None = None
    """The divergence that a token-level objective asked for."""
    rollout_logprob: Tensor | None = None
    """log-probability of y_t when it was drawn; no gradient."""
    weight: Tensor | None = None
    """[B] importance weight of each whole sequence; None stands for 1. No gradient."""


@dataclass(frozen=True)
class PartResult:
    """What one part of a step was like: global over ranks and micro-batches."""

    sums: dict[str, float] = field(default_factory=dict)
    """Sums over completion tokens of every monitored statistic, plus "tokens", "sequences", the
    weights of sequences and their squares ("weight", "weight_squared"), and "logprob_gap", the
    absolute difference between the sampler's log-probs and those of the same model here.

    Of completions that the student drew, with l_t = log q(y_t) at the learner - at the sampler:
    sums over their "ratio_tokens" of two estimators of KL(sampler || learner), "k1" of -l_t and
    "k3" of exp(l_t) - 1 - l_t; and over their "ratio_sequences" the importance ratio
    exp(sum_t l_t) and its square, "ratio" and "ratio_squared"."""
    logprob_gap_max: float = 0.0
    """The largest such difference."""
    costs: Tensor | None = None
    """[T] weighted sum over sequences of the divergence at each position (of the sampled
    log-ratio where the teacher's distribution is not known); None without a teacher."""
    survival: Tensor | None = None
    """[T] weighted number of sequences that have a token there."""
    trained: tuple[str, ...] = ()
    """Sample ids of the completions whose loss was backpropagated."""

    def per_token(self, name: str) -> float | None:
        """Mean of a monitored statistic over completion tokens; None if not monitored."""
        return self.sums[name] / self.sums["tokens"] if name in self.sums else None

    def __add__(self, other: PartResult) -> PartResult:
        names = self.sums | other.sums
        return PartResult(
            {n: self.sums.get(n, 0.0) + other.sums.get(n, 0.0) for n in names},
            max(self.logprob_gap_max, other.logprob_gap_max),
            add_padded(self.costs, other.costs),
            add_padded(self.survival, other.survival),
            self.trained + other.trained,
        )


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports: global over ranks and micro-batches."""

    loss: float
    """The surrogate that was minimised. Its gradient means something, its value need not."""
    grad_norm: float
    """L2 norm before clipping."""
    parts: tuple[PartResult, ...]
    """One for each part of the step, in order."""
    skipped: bool = False
    """Whether loss or gradient was not finite, so that the weights stayed as they were."""


def add_padded(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Sum of two vectors, the shorter one continued with zeros; None counts as nothing."""
    if a is None or b is None:
        return b if a is None else a
    if len(a) < len(b):
        a, b = b, a
    result = a.clone()
    result[: len(b)] += b
    return result


@dataclass(frozen=True, slots=True)
class WeightVersion:
    """A set of student weights published by the learner."""

    policy_version: int
    path: str
    """The safetensors file, for processes of the publishing node."""
    node_id: str
    digests: dict[str, str]
    """xxh3-128 of each tensor's bytes, by parameter name."""
