"""Sequence-level reverse KL by policy gradient: KL(q || p) = E_q sum_t r_t = E_q sum_t KL_t.

With ``r_t = log q(y_t|s_t) - log p(y_t|s_t)`` (a cost) and ``KL_t`` its exact mean over the
vocabulary at s_t, the surrogate of one sequence, before baseline and normalization, is

=============  ==================================================  =======================
estimator      surrogate                                           source
=============  ==================================================  =======================
reinforce      sum_t sg(sum_u r_u) log q(y_t)                      score function
reward_to_go   sum_t sg(sum_{u>=t} r_u) log q(y_t)                 causality
single_step    sum_t [KL_t + sg(sum_{u>t} r_u) log q(y_t)]         MiniLLM, 2306.08543
rao_blackwell  sum_t [KL_t + sg(sum_{u>t} KL_u) log q(y_t)]        2504.10637
=============  ==================================================  =======================

All four have the gradient of KL(q || p) as their expectation under the student.

``normalization``:

- ``total``: the sum above, averaged over sequences. Its optimum includes silence: a student that
  cannot match the teacher is charged for every token it speaks.
- ``rate``: the gradient of ``J = E[sum_t KL_t] / E[L]``, nats per token. Every cost in a return is
  reduced by the rate rho = J and the sum is divided by E[L] (``counts.rate``, ``counts.length``,
  both independent of the batch), so that a token more or less costs nothing on average.
- ``minillm``: the paper's R_{t+1} / (T - t - 1), T the sequence's length; biased.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqkd.types import Counts, TokenStats


def sequence_reverse_kl(
    stats: TokenStats,
    counts: Counts,
    *,
    estimator: str = "rao_blackwell",
    baseline: str = "leave_one_out",
    normalization: str = "rate",
) -> Tensor:
    """Surrogate loss (scalar) on student samples; needs the stats that its table row names."""
    mask = stats.loss_mask
    assert stats.student_logprob is not None
    exact = estimator in ("single_step", "rao_blackwell")
    if estimator == "rao_blackwell":
        assert stats.reverse_kl is not None
        cost = stats.reverse_kl.detach()
    else:
        assert stats.teacher_logprob is not None
        cost = stats.student_logprob.detach() - stats.teacher_logprob
    if normalization == "rate":
        cost = cost - counts.rate
    cost = cost * mask

    returns = _returns(cost, mask, estimator)
    if normalization == "minillm":
        remaining = mask.sum(1, keepdim=True) - torch.arange(
            1, mask.shape[1] + 1, device=mask.device
        )
        returns = returns / remaining.clamp(min=1)
    if baseline == "leave_one_out":
        returns = returns - leave_one_out(returns, stats.group)

    surrogate = returns * stats.student_logprob
    if exact:
        assert stats.reverse_kl is not None
        surrogate = surrogate + stats.reverse_kl
    divisor = counts.sequences * (counts.length if normalization == "rate" else 1.0)
    return (surrogate * mask).sum() / divisor


def _returns(cost: Tensor, mask: Tensor, estimator: str) -> Tensor:
    """[B, T] what log q(y_t) is multiplied by; 0 after the end of a sequence."""
    total = cost.sum(1, keepdim=True)
    before = cost.cumsum(1) - cost
    if estimator == "reinforce":
        return total * mask
    if estimator == "reward_to_go":
        return (total - before) * mask
    return (total - before - cost) * mask


def leave_one_out(returns: Tensor, group: Tensor) -> Tensor:
    """[B, T] mean of the returns of the *other* samples of a prompt at the same position, 0 for
    those that ended before it; 0 where a prompt has one sample. Independent of the sample itself,
    so subtracting it leaves every expectation as it was."""
    same = (group[:, None] == group[None, :]).to(returns.dtype)
    others = same - torch.eye(len(group), dtype=returns.dtype, device=returns.device)
    return others @ returns / others.sum(1, keepdim=True).clamp(min=1)
