"""Objectives: pure functions over [B, T] tensors, one per file, that need only torch.

``OBJECTIVES[kind](stats, counts, **options)`` returns the loss, a scalar to minimize. ``stats`` are
the per-token quantities of one micro-batch (:class:`seqkd.types.TokenStats`). ``counts`` are the
normalizers (:class:`seqkd.types.Counts`), global over ranks and micro-batches, so that the losses
of all micro-batches add up to the loss of the step. The arguments are not modified.

``DIVERGENCES[kind](log_q, log_p[, coefficient])`` is the divergence between the student's and the
teacher's distribution at one state that a token-level objective averages.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from seqkd.objectives.divergences import (
    DIVERGENCES,
    gjsd,
    skew_kl,
    skew_reverse_kl,
    token_forward_kl,
    token_reverse_kl,
    total_variation,
)
from seqkd.objectives.importance import mixture_weight
from seqkd.objectives.sampled_token import sampled_token
from seqkd.objectives.sequence_forward_kl import sequence_forward_kl
from seqkd.objectives.sequence_reverse_kl import sequence_reverse_kl
from seqkd.objectives.sft import sft
from seqkd.objectives.token_mean import token_mean

OBJECTIVES: dict[str, Callable[..., Tensor]] = {
    "sequence_reverse_kl": sequence_reverse_kl,
    "sequence_forward_kl": sequence_forward_kl,
    "sampled_token": sampled_token,
    "sft": sft,
    **dict.fromkeys(DIVERGENCES, token_mean),
}

__all__ = [
    "DIVERGENCES",
    "OBJECTIVES",
    "gjsd",
    "mixture_weight",
    "sampled_token",
    "sequence_forward_kl",
    "sequence_reverse_kl",
    "sft",
    "skew_kl",
    "skew_reverse_kl",
    "token_forward_kl",
    "token_mean",
    "token_reverse_kl",
    "total_variation",
]
