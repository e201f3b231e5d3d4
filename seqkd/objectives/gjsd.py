"""Generalised Jensen-Shannon divergence (GKD, 2306.13649):
beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q.

Bounded by log 2 at beta = 1/2. Divided by beta it tends to the forward KL as beta -> 0, divided by
1 - beta to the reverse KL as beta -> 1; at either end it is 0 itself.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def gjsd(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    """[..., V] log-probs of student and teacher -> [...] in nats; 0 < beta < 1."""
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    forward = (log_p.exp() * (log_p - log_m)).sum(-1)
    reverse = (log_q.exp() * (log_q - log_m)).sum(-1)
    return beta * forward + (1 - beta) * reverse
