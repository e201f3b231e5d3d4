"""Objectives: one pure function a file over [B, T] tensors, needing nothing but torch.

``objective(stats, counts, **options) -> loss``, a scalar to minimise. ``stats`` holds the
per-token quantities of one micro-batch (:class:`seqkd.types.TokenStats`), ``counts`` what the loss
divides by (:class:`seqkd.types.Counts`), global over ranks and micro-batches: summing the losses of
all micro-batches gives the loss of the step, and nothing is mutated.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from seqkd.objectives.sequence_forward_kl import sequence_forward_kl
from seqkd.objectives.sequence_reverse_kl import sequence_reverse_kl
from seqkd.objectives.sft import sft
from seqkd.objectives.token_forward_kl import token_forward_kl
from seqkd.objectives.token_reverse_kl import token_reverse_kl

OBJECTIVES: dict[str, Callable[..., Tensor]] = {
    "sequence_reverse_kl": sequence_reverse_kl,
    "sequence_forward_kl": sequence_forward_kl,
    "token_forward_kl": token_forward_kl,
    "token_reverse_kl": token_reverse_kl,
    "sft": sft,
}

__all__ = ["OBJECTIVES", *OBJECTIVES]
