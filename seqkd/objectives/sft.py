"""Supervised fine-tuning: the mean over tokens of -log q(y_t|s_t) on existing answers."""

from __future__ import annotations

from torch import Tensor

from seqkd.types import Counts, TokenStats


def sft(stats: TokenStats, counts: Counts) -> Tensor:
    """Return the mean over completion tokens of -log q(y_t|s_t). Needs ``student_logprob``."""
    assert stats.student_logprob is not None
    return -(stats.student_logprob * stats.loss_mask).sum() / counts.tokens
