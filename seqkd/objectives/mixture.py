"""Importance weights of sequences that come whole from the teacher with probability alpha, else
from the student: w(y) = q(y) / ((1 - alpha) q(y) + alpha p(y)).

Exact, so that E_mixture[w f] = E_student[f] for every f, and bounded by 1 / (1 - alpha). MiniLLM
(2306.08543) mixes at every token instead and keeps one factor of the weight, which is biased.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def mixture_weight(student_logprob: Tensor, teacher_logprob: Tensor, alpha: float) -> Tensor:
    """[B] log-probs of whole sequences -> [B] weights; 0 < alpha < 1. No gradient."""
    log_ratio = (teacher_logprob - student_logprob).detach()
    log_mixture = torch.logaddexp(
        torch.full_like(log_ratio, math.log1p(-alpha)), log_ratio + math.log(alpha)
    )
    return torch.exp(-log_mixture)
