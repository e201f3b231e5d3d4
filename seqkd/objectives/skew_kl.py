"""Skew KL divergences (DistiLLM, 2402.03898): each distribution against a mixture that holds a
share lambda of itself, so that the log-ratio is bounded by -log(lambda)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def skew_kl(log_q: Tensor, log_p: Tensor, skew: float) -> Tensor:
    """[..., V] -> [...] KL(p || skew p + (1 - skew) q), in nats; 0 < skew < 1."""
    log_m = torch.logaddexp(log_p + math.log(skew), log_q + math.log1p(-skew))
    return (log_p.exp() * (log_p - log_m)).sum(-1)


def skew_reverse_kl(log_q: Tensor, log_p: Tensor, skew: float) -> Tensor:
    """[..., V] -> [...] KL(q || skew q + (1 - skew) p), in nats; 0 < skew < 1."""
    return skew_kl(log_p, log_q, skew)
