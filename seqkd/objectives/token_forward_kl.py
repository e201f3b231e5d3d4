"""Token-level forward KL: sum_v p(v|s_t) log p(v|s_t)/q(v|s_t), averaged over tokens."""

from __future__ import annotations

from torch import Tensor

from seqkd.types import Counts, TokenStats


def token_forward_kl(stats: TokenStats, counts: Counts) -> Tensor:
    """Mean over completion tokens, on states from any source; needs ``forward_kl``."""
    assert stats.forward_kl is not None
    return (stats.forward_kl * stats.loss_mask).sum() / counts.tokens
