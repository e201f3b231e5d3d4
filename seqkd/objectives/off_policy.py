"""The policy-gradient term for samples of an older student, with the token ratio
w_t = q(y_t|s_t) / q_old(y_t|s_t), q_old the distribution that drew the token.

On fresh samples w_t = 1, and both corrections have the plain term's gradient. They correct the
choice of y_t and not the states visited on the way, which remain those of the older student.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqkd.types import TokenStats


def policy_gradient_term(
    stats: TokenStats, returns: Tensor, clip_ratio: float | None, importance_ratio_cap: float | None
) -> Tensor:
    """[B, T] surrogate whose gradient is ``returns`` (costs, [B, T], detached) times that of
    log q(y_t|s_t), corrected for the token's age.

    - ``importance_ratio_cap`` C: times min(w_t, C) (Ionides 2008, truncated importance sampling).
    - ``clip_ratio`` e: PPO's max(w_t R, clip(w_t, 1 - e, 1 + e) R) for a cost R (1707.06347).
    """
    assert stats.student_logprob is not None
    if clip_ratio is None and importance_ratio_cap is None:
        return returns * stats.student_logprob
    assert stats.rollout_logprob is not None
    ratio = torch.exp(stats.student_logprob - stats.rollout_logprob)
    if importance_ratio_cap is not None:
        return returns * ratio.detach().clamp(max=importance_ratio_cap) * stats.student_logprob
    assert clip_ratio is not None
    return torch.maximum(returns * ratio, returns * ratio.clamp(1 - clip_ratio, 1 + clip_ratio))
