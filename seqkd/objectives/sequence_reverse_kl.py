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

``baseline`` is subtracted from what multiplies log q(y_t), and is independent of the sample:
``leave_one_out`` is the mean of the prompt's other samples at the same position, 0 for those that
ended; ``position_mean`` the mean at that position over past batches (``counts.costs``,
``counts.survival``).

``normalization``:

- ``total``: the sum above, averaged over sequences. Its optimum includes silence: a student that
  cannot match the teacher is charged for every token it speaks.
- ``rate``: the gradient of ``J = E[sum_t KL_t] / E[L]``, nats per token. Every cost in a return is
  reduced by the rate rho = J and the sum is divided by E[L] (``counts.rate``, ``counts.length``,
  both independent of the batch), so that an average token more or less costs nothing. Where late
  tokens are cheaper than the average, as on real models they are, it still pays to run on.
- ``minillm``: the paper's R_{t+1} / (T - t - 1), T the sequence's length; biased. The default: of
  the three it alone kept the teacher's length on a real pair (docs/estimators.md).

Two dials between the sequence and the token level, biased for every value below 1:
``future_weight`` multiplies the future in each return, ``discount`` its cost u - t tokens ahead by
discount^(u - t). At 0 either leaves the token level. ``clip_ratio`` and ``importance_ratio_cap``
correct for samples of an older student (:mod:`seqkd.objectives.importance`).

Where ``stats.weight`` is set (:mod:`seqkd.objectives.importance`), it weights every sequence.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from seqkd.objectives.importance import policy_gradient_term
from seqkd.types import Counts, TokenStats


def sequence_reverse_kl(
    stats: TokenStats,
    counts: Counts,
    *,
    estimator: str = "rao_blackwell",
    baseline: str = "leave_one_out",
    normalization: str = "minillm",
    future_weight: float = 1.0,
    discount: float = 1.0,
    clip_ratio: float | None = None,
    importance_ratio_cap: float | None = None,
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

    def returns_of(costs: Tensor) -> Tensor:
        return _returns(costs, estimator, future_weight, discount)

    returns = returns_of(cost) * mask
    if normalization == "minillm":
        remaining = mask.sum(1, keepdim=True) - torch.arange(
            1, mask.shape[1] + 1, device=mask.device
        )
        returns = returns / remaining.clamp(min=1)
    if baseline == "leave_one_out":
        returns = returns - leave_one_out(returns, stats.group)
    elif baseline == "position_mean":
        returns = returns - position_mean(
            returns_of, counts, estimator, normalization, mask.shape[1], mask.device
        )

    surrogate = policy_gradient_term(stats, returns, clip_ratio, importance_ratio_cap)
    if exact:
        assert stats.reverse_kl is not None
        surrogate = surrogate + stats.reverse_kl
    if stats.weight is not None:
        surrogate = surrogate * stats.weight[:, None]
    divisor = counts.sequences * (counts.length if normalization == "rate" else 1.0)
    return (surrogate * mask).sum() / divisor


def _returns(cost: Tensor, estimator: str, future_weight: float, discount: float) -> Tensor:
    """[B, T] costs, 0 after the end -> [B, T] what log q(y_t) is multiplied by."""
    if estimator == "reinforce":
        return cost.sum(1, keepdim=True).expand_as(cost)
    future = future_weight * discounted_future(cost, discount)
    return future + cost if estimator == "reward_to_go" else future


def discounted_future(cost: Tensor, discount: float) -> Tensor:
    """[B, T] -> [B, T] sum_{u>t} discount^(u-t) cost_u."""
    pad = torch.nn.functional.pad
    ahead, reach = cost, 1  # sum_{t<=u<t+reach}: doubled until it is the whole
    while reach < cost.shape[1]:
        ahead = ahead + discount**reach * pad(ahead[:, reach:], (0, reach))
        reach *= 2
    return discount * pad(ahead[:, 1:], (0, 1))


def leave_one_out(returns: Tensor, group: Tensor) -> Tensor:
    """[B, T] mean of the returns of the *other* samples of a prompt at the same position, 0 for
    those that ended before it; 0 where a prompt has one sample. Independent of the sample itself,
    so subtracting it leaves every expectation as it was."""
    same = (group[:, None] == group[None, :]).to(returns.dtype)
    others = same - torch.eye(len(group), dtype=returns.dtype, device=returns.device)
    return others @ returns / others.sum(1, keepdim=True).clamp(min=1)


def position_mean(
    returns_of: Callable[[Tensor], Tensor],
    counts: Counts,
    estimator: str,
    normalization: str,
    size: int,
    device: torch.device,
) -> Tensor:
    """[size] mean return of the sequences that have a token t, over past batches; 0 where none
    had. Under reinforce, whose return is the whole cost, the mean over all sequences."""
    assert counts.costs is not None and counts.survival is not None
    cost = counts.costs - counts.rate * counts.survival if normalization == "rate" else counts.costs
    survival = counts.survival[:1].expand_as(cost) if estimator == "reinforce" else counts.survival
    means = torch.where(survival > 0, returns_of(cost[None])[0] / survival, 0.0)
    return torch.nn.functional.pad(means, (0, max(0, size - len(means))))[:size].to(device)
