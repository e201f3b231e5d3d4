"""The loss of every token-level objective: the mean over tokens of its divergence."""

from __future__ import annotations

from torch import Tensor

from seqkd.types import Counts, TokenStats


def token_mean(stats: TokenStats, counts: Counts) -> Tensor:
    """Return the mean over completion tokens of ``divergence``. The states may come from any
    source."""
    assert stats.divergence is not None
    return (stats.divergence * stats.loss_mask).sum() / counts.tokens
