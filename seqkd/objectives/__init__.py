"""Objectives: one pure function a file over [B, T] tensors, needing nothing but torch.

``OBJECTIVES[kind](stats, counts, **options) -> loss``, a scalar to minimize. ``stats`` holds the
per-token quantities of one micro-batch (:class:`seqkd.types.TokenStats`), ``counts`` what the loss
divides by (:class:`seqkd.types.Counts`), global over ranks and micro-batches: summing the losses of
all micro-batches gives the loss of the step, and nothing is mutated.

``DIVERGENCES[kind](log_q, log_p[, coefficient])`` is what a token-level objective averages: a
divergence between the student's and the teacher's distribution at one state.
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
