"""Total variation (f-distill, 2307.15190): sum_v |p(v|s_t) - q(v|s_t)| / 2, between 0 and 1."""

from __future__ import annotations

from torch import Tensor


def total_variation(log_q: Tensor, log_p: Tensor) -> Tensor:
    """[..., V] log-probs of student and teacher -> [...], no unit."""
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)
