"""Divergences between the student's and the teacher's distribution at one state.

Every function takes the log-probs of the student and the teacher, [..., V], and returns [...].
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def token_forward_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Return KL(p || q) = sum_v p(v|s_t) log p(v|s_t)/q(v|s_t), in nats."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def token_reverse_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Return KL(q || p) = sum_v q(v|s_t) log q(v|s_t)/p(v|s_t), in nats.

    On the student's own samples this is the usual loss of on-policy distillation (GKD, 2306.13649).
    It drops the future term of the sequence-level gradient.
    """
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def gjsd(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    """Return the generalized Jensen-Shannon divergence (GKD, 2306.13649), in nats:
    beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q and 0 < beta < 1.

    At beta = 1/2 it is bounded by log 2. Divided by beta, it tends to the forward KL as beta -> 0.
    Divided by 1 - beta, it tends to the reverse KL as beta -> 1. It is 0 at both ends.
    """
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    forward = (log_p.exp() * (log_p - log_m)).sum(-1)
    reverse = (log_q.exp() * (log_q - log_m)).sum(-1)
    return beta * forward + (1 - beta) * reverse


def skew_kl(log_q: Tensor, log_p: Tensor, skew: float) -> Tensor:
    """Return KL(p || skew p + (1 - skew) q) with 0 < skew < 1, in nats (DistiLLM, 2402.03898).

    The mixture contains a share ``skew`` of p, so the log-ratio is at most -log(skew).
    """
    log_m = torch.logaddexp(log_p + math.log(skew), log_q + math.log1p(-skew))
    return (log_p.exp() * (log_p - log_m)).sum(-1)


def skew_reverse_kl(log_q: Tensor, log_p: Tensor, skew: float) -> Tensor:
    """Return KL(q || skew q + (1 - skew) p) with 0 < skew < 1, in nats."""
    return skew_kl(log_p, log_q, skew)


def total_variation(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Return the total variation sum_v |p(v|s_t) - q(v|s_t)| / 2, between 0 and 1 (f-distill,
    2307.15190)."""
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


def graded_kl(log_q: Tensor, log_p: Tensor, ends: Tensor) -> Tensor:
    """Return the divergence that grades the decision to end the completion on its own, in nats:
    KL(h' || h) + sg(1 - h) KL(c || c') + sg(h) KL(e || e').

    ``ends`` are the ids of the tokens that end a completion. For the student, h is their
    probability, e the distribution over them, and c the distribution over all other tokens (h', e'
    and c' for the teacher). sg is stop-gradient.

    KL(q || p) = KL(h || h') + (1 - h) KL(c || c') + h KL(e || e'). A student that cannot match c'
    lowers it by ending more often than the teacher: the optimal log-odds of the end are those of
    the teacher plus KL(c || c') - KL(e || e'). Here they are those of the teacher. The binary
    divergence KL(h' || h) is a proper score with a gradient of h - h' by the log-odds.
    """

    def split(log: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        end, content = log[..., ends], without(log, ends)
        stop = torch.stack([end.logsumexp(-1), content.logsumexp(-1)], -1)
        return stop, torch.log_softmax(end, -1), torch.log_softmax(content, -1)

    (stop, end, content), (stop_p, end_p, content_p) = split(log_q), split(log_p)
    gap = (content - content_p).index_fill(-1, ends, 0.0)  # instead of inf - inf
    h, rest = stop.detach().exp().unbind(-1)
    within = rest * (content.exp() * gap).sum(-1) + h * token_reverse_kl(end, end_p)
    return token_forward_kl(stop, stop_p) + within


def without(log_probs: Tensor, ends: Tensor) -> Tensor:
    """Return [..., V] log-probs with those of the tokens ``ends`` set to -inf."""
    return log_probs.index_fill(-1, ends, -torch.inf)


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "token_forward_kl": token_forward_kl,
    "token_reverse_kl": token_reverse_kl,
    "gjsd": gjsd,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "total_variation": total_variation,
}
"""Divergence that a token-level objective averages, by the kind of the objective."""
