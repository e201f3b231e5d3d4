"""Sequence-level forward KL on teacher samples (SeqKD): KL(p || q) = const - E_{y~p} log q(y)."""

from __future__ import annotations

from torch import Tensor

from seqkd.types import Counts, TokenStats


def sequence_forward_kl(stats: TokenStats, counts: Counts) -> Tensor:
    """Return the mean over sequences of -sum_t log q(y_t|s_t), y ~ p. Needs ``student_logprob``."""
    assert stats.student_logprob is not None
    return -(stats.student_logprob * stats.loss_mask).sum() / counts.sequences
