"""Records that are passed between processes or modules.

Axis names:

- B: sequences of a micro-batch, in R rows
- S: tokens of a padded row
- T: tokens of a padded completion
- N: real completion tokens of a micro-batch (``loss_mask.sum()``)
- H: hidden size
- V: vocabulary size

Log-probabilities are natural logarithms. Divergences are in nats.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

# torch has no read-only tensors and warns whenever it wraps a read-only array (see TensorRecord).
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")

Source = Literal["student", "teacher", "dataset", "corpus"]


class Divergence(NamedTuple):
    """A divergence between the student's and the teacher's next-token distributions at one state,
    with its options."""

    kind: str
    """A key of :data:`seqkd.objectives.DIVERGENCES`."""
    coefficient: float | None = None
    """beta of ``gjsd`` or lambda of the skew divergences."""
    temperature: float = 1.0
    """Temperature of both distributions, softmax(logits / temperature). The divergence is
    multiplied by its square."""


class EndStat(NamedTuple):
    """A quantity that separates the decision to end the completion at a state from the choice of
    the token."""

    name: Literal["end_logprob", "content_logprob", "graded_kl"]
    """``end_logprob``: log-probability that the completion ends at the state, which is the
    probability of any of ``token_ids``. The other two are fields of :class:`TokenStats`."""
    token_ids: tuple[int, ...]
    """Tokens that end a completion."""


Stat = str | Divergence | EndStat
"""A per-token quantity: the name of a field of :class:`TokenStats`, a divergence, or an
:class:`EndStat`."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt, rendered and tokenized for the student."""

    prompt_id: str
    """Stable identifier: a hash of ``token_ids``."""
    token_ids: tuple[int, ...]
    text: str
    """User message, for reports."""
    reference_ids: tuple[int, ...] | None = None
    """Tokens of the data set's answer, including end-of-sequence. None without an answer."""
    messages: tuple[tuple[str, str], ...] = ()
    """Messages of the prompt as (role, content), for a teacher with its own chat template."""
    reference_cut: bool = False
    """True if the answer was truncated and so does not end with the end-of-sequence token."""
    tag: str = ""
    """Label from the data set, such as a category. It selects one of several teachers."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """One completion of one prompt, sampled or read from a data set."""

    prompt_id: str
    sample_id: str
    """Unique within a run: ``<prompt_id>/<source>/<seed>/<index>``."""
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    """Token ids of the completion, at least one. The last one is the end-of-sequence token unless
    ``finish_reason`` is "length". Empty if it is "refused"."""
    rollout_logprobs: tuple[float, ...] | None
    """Log-probability of each completion token under the distribution that it was sampled from.
    None for completions from a data set."""
    source: Source
    policy_version: int
    """Number of weight syncs that the sampling engine had received (0: initial weights)."""
    finish_reason: Literal["stop", "length", "refused"]
    """stop: ended by the model; length: truncated; refused: no completion, because the endpoint
    refused or its responses were invalid."""
    tag: str = ""
    """Tag of the prompt."""

    @property
    def refused(self) -> bool:
        """True if there is no completion."""
        return self.finish_reason == "refused"


def rollout_from(values: Mapping[str, Any]) -> Rollout:
    """Build a rollout from plain data: the result of :func:`dataclasses.asdict` after a round trip
    through JSON or Arrow."""
    logprobs = values["rollout_logprobs"]
    tuples = {
        "prompt_ids": tuple(values["prompt_ids"]),
        "completion_ids": tuple(values["completion_ids"]),
        "rollout_logprobs": None if logprobs is None else tuple(logprobs),
    }
    return Rollout(**{**values, **tuples})


class TensorRecord:
    """A record whose tensors are pickled as NumPy arrays.

    Pickle protocol 5 passes the memory of arrays out of band. Ray then copies the data once, into
    its object store, and processes on the same node read it in place. That memory is read-only:
    a write to such a tensor crashes the process.
    """

    __slots__ = ()

    def __reduce__(self) -> tuple[Any, ...]:
        values = (getattr(self, f.name) for f in fields(self))  # type: ignore[arg-type]
        return _unpack_record, (
            type(self),
            *(_pack(v) if isinstance(v, Tensor) else v for v in values),
        )

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Return a copy of the record with ``function`` applied to every tensor."""
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
    """A teacher's scores of one rollout: either ``hidden``, or ``logprobs`` with or without the two
    ``top`` fields. None of them if an endpoint refused to score the rollout."""

    sample_id: str
    hidden: Tensor | None = None
    """[T, H] last hidden states (after the final norm) at the states *before* each completion
    token. The teacher's output head maps them to the full next-token distribution."""
    logprobs: Tensor | None = None
    """[T] float32 log-probability of each completion token."""
    top_ids: Tensor | None = None
    """[T, k] int32 token ids: the teacher's k most probable tokens at the state before each
    completion token."""
    top_logprobs: Tensor | None = None
    """[T, k + 1] float32 log-probabilities of ``top_ids``. The last entry is the logarithm of the
    remaining probability (the tail)."""
    teacher: str = ""
    """Name of the teacher, if there are several."""

    @property
    def refused(self) -> bool:
        """True if there is no score."""
        return self.hidden is None and self.logprobs is None


@dataclass(frozen=True, slots=True)
class TrainBatch(TensorRecord):
    """One micro-batch of one learner rank. It contains all samples of each of its prompts."""

    input_ids: Tensor
    """[R, S] long, right-padded rows. A row is a prompt followed by one completion or by the
    completions of all its samples."""
    attention_mask: Tensor
    """[R, S] long, 1 on real tokens."""
    position_ids: Tensor | None
    """[R, S] long, position of each token in its own sequence. None if it equals the position in
    the row."""
    segment: Tensor | None
    """[R, S] long, 0 in a prompt and k in the k-th completion of a row. A completion attends only
    to the prompt and to itself. None if every row is one sequence."""
    state_row: Tensor
    """[B] long, row of each sequence."""
    state_index: Tensor
    """[B, T] long, position in the row whose hidden state predicts completion token t."""
    target_ids: Tensor
    """[B, T] long, completion tokens (0 on padding)."""
    loss_mask: Tensor
    """[B, T] bool, True on completion tokens."""
    group: Tensor
    """[B] long, equal for samples of the same prompt."""
    rollout_logprobs: Tensor | None
    """[B, T] float32, 0 on padding; None for completions that were not sampled."""
    by_teacher: Tensor
    """[B] bool, True if the teacher wrote the completion."""
    teacher_hidden: Tensor | None = None
    """[N, H] teacher states in the order of ``loss_mask.nonzero()``."""
    teacher_logprobs: Tensor | None = None
    """[B, T] float32, 0 on padding."""
    teacher_top_ids: Tensor | None = None
    """[N, k] int32, in the order of ``teacher_hidden``."""
    teacher_top_logprobs: Tensor | None = None
    """[N, k + 1] float32, in the order of ``teacher_hidden``."""
    teacher: str = ""
    """Name of the teacher that scored every sequence, if there are several teachers."""
    sample_ids: tuple[str, ...] = ()
    """Sample ids of the B sequences, without a sequence that only fills an empty micro-batch."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Normalizers and running estimates that a loss uses. They are constants of the optimizer step,
    equal on every rank and micro-batch, so that splitting a batch never changes a gradient.

    All estimates come from data that is independent of the batch, except at the first step of a
    phase (see :mod:`seqkd.learner.running_costs`).
    """

    sequences: float
    """Number of sequences in the step."""
    tokens: float
    """Number of completion tokens in the step."""
    rate: float = 0.0
    """Estimate of J = E[sum_t KL_t] / E[L] in nats per token."""
    length: float = 1.0
    """Estimate of E[L] in tokens."""
    costs: Tensor | None = None
    """[T'] estimate of E[KL_t; the sequence has a token t], up to a common factor."""
    survival: Tensor | None = None
    """[T'] estimate of the probability that a sequence has a token t, times the same factor."""


@dataclass(frozen=True, slots=True)
class TokenStats:
    """Per-token quantities of a micro-batch, [B, T] unless noted, 0 on padding. A field is None
    unless an objective requested it. The values are differentiable in the student's weights."""

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
    """Entropy of the student, -sum_v q log q."""
    content_logprob: Tensor | None = None
    """log q(y_t | s_t, the completion does not end at s_t); 0 at a token that ends it."""
    graded_kl: Tensor | None = None
    """:func:`seqkd.objectives.divergences.graded_kl`, exact over the vocabulary."""
    divergence: Tensor | None = None
    """Divergence that a token-level objective requested."""
    rollout_logprob: Tensor | None = None
    """Log-probability of y_t when it was sampled; no gradient."""
    weight: Tensor | None = None
    """[B] importance weight of each whole sequence. None means 1. No gradient."""


@dataclass(frozen=True)
class PartResult:
    """Statistics of one part of a step, global over ranks and micro-batches."""

    sums: dict[str, float] = field(default_factory=dict)
    """Sums over completion tokens of every monitored statistic, and:

    - "tokens" and "sequences": their numbers
    - "weight" and "weight_squared": sums over sequences of the weight and of its square
    - "logprob_gap": sum over tokens of the absolute difference between the sampler's log-probs and
      the log-probs that the same model has in the learner

    For completions that the student sampled, with l_t = log q(y_t) at the learner minus log q(y_t)
    at the sampler:

    - "ratio_tokens" and "ratio_sequences": their numbers
    - "k1" and "k3": sums over tokens of two estimators of KL(sampler || learner), -l_t and
      exp(l_t) - 1 - l_t
    - "ratio" and "ratio_squared": sums over sequences of the importance ratio exp(sum_t l_t) and of
      its square
    """
    logprob_gap_max: float = 0.0
    """Largest absolute difference between the sampler's and the learner's log-prob of a token."""
    costs: Tensor | None = None
    """[T] weighted sum over sequences of the divergence at each position, or of the sampled
    log-ratio if the teacher's distribution is unknown. None without a teacher."""
    survival: Tensor | None = None
    """[T] weighted number of sequences that have a token at each position."""
    trained: tuple[str, ...] = ()
    """Sample ids of the completions whose loss was backpropagated."""

    def per_token(self, name: str) -> float | None:
        """Return the mean of a statistic over completion tokens, or None if it was not
        monitored."""
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
    """Results of one optimizer step, global over ranks and micro-batches."""

    loss: float
    """Value of the surrogate loss. Its gradient is meaningful, its value may not be."""
    grad_norm: float
    """L2 norm of the gradient before clipping."""
    parts: tuple[PartResult, ...]
    """Statistics of each part of the step, in order."""
    skipped: bool = False
    """True if the loss or the gradient was not finite, so that the weights were not changed."""


def add_padded(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Add two vectors after padding the shorter one with zeros. None counts as an empty vector."""
    if a is None or b is None:
        return b if a is None else a
    if len(a) < len(b):
        a, b = b, a
    result = a.clone()
    result[: len(b)] += b
    return result


@dataclass(frozen=True, slots=True)
class WeightVersion:
    """A version of the student's weights, published by the learner."""

    policy_version: int
    path: str
    """Path of the safetensors file, for processes on the publishing node."""
    node_id: str
    digests: dict[str, str]
    """xxh3-128 digest of each tensor's bytes, by parameter name."""
