"""Per-token policy gradient with the sampled token only: sum_t sg(r_t) log q(y_t|s_t) with the cost
r_t = log q(y_t|s_t) - log p(y_t|s_t).

The expectation of its gradient under the student is the gradient of the token-level reverse KL at
the visited states. It needs only the teacher's log-prob of the sampled token, which many APIs
return. It drops the future term, so it is a biased estimate of the sequence-level gradient.
"""

from __future__ import annotations

from torch import Tensor

from seqkd.objectives.importance import policy_gradient_term
from seqkd.types import Counts, TokenStats


def sampled_token(
    stats: TokenStats,
    counts: Counts,
    *,
    clip_ratio: float | None = None,
    importance_ratio_cap: float | None = None,
) -> Tensor:
    """Return the mean over completion tokens. Needs ``student_logprob`` and ``teacher_logprob``."""
    assert stats.student_logprob is not None and stats.teacher_logprob is not None
    cost = stats.student_logprob.detach() - stats.teacher_logprob
    surrogate = policy_gradient_term(stats, cost, clip_ratio, importance_ratio_cap)
    if stats.weight is not None:
        surrogate = surrogate * stats.weight[:, None]
    return (surrogate * stats.loss_mask).sum() / counts.tokens
