"""Token-level reverse KL: sum_v q(v|s_t) log q(v|s_t)/p(v|s_t), averaged over tokens."""

from __future__ import annotations

from torch import Tensor

from seqkd.types import Counts, TokenStats


def token_reverse_kl(stats: TokenStats, counts: Counts) -> Tensor:
    """Mean over completion tokens, on states from any source; needs ``reverse_kl``."""
    assert stats.reverse_kl is not None
    return (stats.reverse_kl * stats.loss_mask).sum() / counts.tokens
