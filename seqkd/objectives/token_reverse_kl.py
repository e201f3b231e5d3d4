"""Token-level reverse KL: sum_v q(v|s_t) log q(v|s_t)/p(v|s_t). On the student's own samples this
is what on-policy distillation mostly minimises (GKD, 2306.13649): the future term is dropped."""

from __future__ import annotations

from torch import Tensor


def token_reverse_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """[..., V] log-probs of student and teacher -> [...] KL(q || p), exact, in nats."""
    return (log_q.exp() * (log_q - log_p)).sum(-1)
