"""Corrections for samples that are not from the current student: importance weights of sequences
from a mixture with the teacher, and token ratios for samples of an older student."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from seqkd.types import TokenStats


def mixture_weight(student_logprob: Tensor, teacher_logprob: Tensor, alpha: float) -> Tensor:
    """Return the importance weights w(y) = q(y) / ((1 - alpha) q(y) + alpha p(y)) of sequences that
    are sampled from the teacher with probability ``alpha`` and otherwise from the student.

    Takes [B] log-probs of whole sequences and 0 < alpha < 1, returns [B] without gradient. The
    weights are exact, E_mixture[w f] = E_student[f] for every f, and at most 1 / (1 - alpha).
    MiniLLM (2306.08543) instead mixes at every token and keeps one factor of the weight, which is
    biased.
    """
    log_ratio = (teacher_logprob - student_logprob).detach()
    log_mixture = torch.logaddexp(
        torch.full_like(log_ratio, math.log1p(-alpha)), log_ratio + math.log(alpha)
    )
    return torch.exp(-log_mixture)


def policy_gradient_term(
    stats: TokenStats,
    returns: Tensor,
    clip_ratio: float | None,
    importance_ratio_cap: float | None,
    content: bool = False,
) -> Tensor:
    """Return a [B, T] surrogate whose gradient is ``returns`` (costs, [B, T], detached) times the
    gradient of log q(y_t|s_t), with an optional correction by the token ratio
    w_t = q(y_t|s_t) / q_old(y_t|s_t), where q_old is the distribution that y_t was sampled from.
    With ``content``, the gradient is that of ``content_logprob`` instead.

    - ``importance_ratio_cap`` C: the gradient is multiplied by min(w_t, C) (Ionides 2008, truncated
      importance sampling).
    - ``clip_ratio`` e: PPO's max(w_t R, clip(w_t, 1 - e, 1 + e) R) for a cost R (1707.06347).

    On fresh samples w_t = 1, and both corrections have the gradient of the uncorrected term. They
    correct the distribution of y_t, but not the distribution of the states before it, which remains
    that of the older student.
    """
    logprob = stats.content_logprob if content else stats.student_logprob
    assert logprob is not None
    if clip_ratio is None and importance_ratio_cap is None:
        return returns * logprob
    assert stats.student_logprob is not None and stats.rollout_logprob is not None
    ratio = torch.exp(stats.student_logprob.detach() - stats.rollout_logprob)
    if importance_ratio_cap is not None:
        return returns * ratio.clamp(max=importance_ratio_cap) * logprob
    ratio = ratio * torch.exp(logprob - logprob.detach())
    assert clip_ratio is not None
    return torch.maximum(returns * ratio, returns * ratio.clamp(1 - clip_ratio, 1 + clip_ratio))
