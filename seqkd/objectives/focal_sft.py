"""Focal supervised fine-tuning: tokens that the student predicts well weigh less (1708.02002)."""

from __future__ import annotations

from torch import Tensor

from seqkd.types import Counts, TokenStats


def focal_sft(stats: TokenStats, counts: Counts, *, gamma: float = 2.0) -> Tensor:
    """Return the mean over tokens of -(1 - q)^gamma log q; needs ``student_logprob``."""
    assert stats.student_logprob is not None
    weight = (1 - stats.student_logprob.detach().exp()) ** gamma
    return -(weight * stats.student_logprob * stats.loss_mask).sum() / counts.tokens
