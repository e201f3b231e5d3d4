"""Token-level forward KL: sum_v p(v|s_t) log p(v|s_t)/q(v|s_t)."""

from __future__ import annotations

from torch import Tensor


def token_forward_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """[..., V] log-probs of student and teacher -> [...] KL(p || q), exact, in nats."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)
