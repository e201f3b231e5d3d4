"""Sequence-level reverse KL by policy gradient: KL(q || p) = E_q sum_t r_t = E_q sum_t KL_t.

Let ``r_t = log q(y_t|s_t) - log p(y_t|s_t)`` be the cost of a token, and ``KL_t`` its exact mean
over the vocabulary at s_t. The surrogate of one sequence, before baseline and normalization, is

=============  ==================================================  =======================
estimator      surrogate                                           source
=============  ==================================================  =======================
reinforce      sum_t sg(sum_u r_u) log q(y_t)                      score function
reward_to_go   sum_t sg(sum_{u>=t} r_u) log q(y_t)                 causality
single_step    sum_t [KL_t + sg(sum_{u>t} r_u) log q(y_t)]         MiniLLM, 2306.08543
rao_blackwell  sum_t [KL_t + sg(sum_{u>t} KL_u) log q(y_t)]        2504.10637
=============  ==================================================  =======================

For each of the four, the expectation of its gradient under the student is the gradient of
KL(q || p).

``baseline`` is subtracted from the factor of log q(y_t). It is independent of the sample:

- ``leave_one_out``: the mean over the prompt's other samples at the same position, where samples
  that ended count as 0.
- ``position_mean``: the mean over past batches at the same position (``counts.costs``,
  ``counts.survival``).

``normalization``:

- ``total``: the sum above, averaged over sequences. It favors length collapse: a student that
  cannot match the teacher pays for every token that it generates.
- ``rate``: the gradient of ``J = E[sum_t KL_t] / E[L]``, in nats per token. The rate rho = J is
  subtracted from every cost in a return, and the sum is divided by E[L] (``counts.rate``,
  ``counts.length``, both independent of the batch), so an additional token of average cost does not
  change the loss. On real models late tokens are cheaper than the average, so it still favors long
  outputs.
- ``minillm``: the paper's R_{t+1} / (T - t - 1) with the sequence length T; biased. It pushes the
  student to end: at a stationary point of a student with free logits, the log-odds of the end
  exceed the teacher's by KL_c, the divergence over the other tokens, plus the mean of that return
  over continuations.
- ``neutral``: the gradient of ``J_w = sum_t w_t mu_t`` with ``mu_t = E[KL_t | t < L]``, in nats per
  token. The weights are P(t < L) / E[L] at the current student, as constants, so a change of the
  length changes J_w only through the costs at each position. mu_t is subtracted from the cost at
  position t in a return, and the sum is divided by E[L] (``counts.costs / counts.survival`` and
  ``counts.length``, independent of the batch). An error of an estimate of mu_t adds that error
  times the gradient of P(t < L), over E[L]. The weights move with the student, so no one quantity
  is minimized over a whole training. Ending the expensive sequences and continuing the cheap ones
  still pays.

Two options interpolate between the token level (0) and the sequence level (1), with a bias for
every value below 1: ``future_weight`` multiplies the future cost in every return, and ``discount``
multiplies a cost u - t tokens ahead by discount^(u - t).

``stop`` selects what the decision to end the completion is charged for:

- ``future``: the return, like every other choice.
- ``graded``: only its own divergence from the teacher's decision. The return is the factor of
  log q(y_t | not the end), and of nothing at a token that ends. KL_t outside returns is replaced by
  :func:`~seqkd.objectives.divergences.graded_kl`. Biased: neither the effect of the end on later
  costs nor its effect on the cost of the choice of the token is in the gradient. Requires
  single_step or rao_blackwell.

``clip_ratio`` and ``importance_ratio_cap`` correct for samples of an older student
(:mod:`seqkd.objectives.importance`).

If ``stats.weight`` is set (:mod:`seqkd.objectives.importance`), every sequence is multiplied by its
weight.
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
    stop: str = "future",
    clip_ratio: float | None = None,
    importance_ratio_cap: float | None = None,
) -> Tensor:
    """Return the surrogate loss, a scalar, on student samples.

    Needs ``student_logprob``, and ``reverse_kl`` (rao_blackwell), ``teacher_logprob`` (reinforce,
    reward_to_go) or both (single_step), and ``content_logprob`` and ``graded_kl`` if ``stop`` is
    graded.
    """
    mask = stats.loss_mask
    assert stats.student_logprob is not None
    exact = estimator in ("single_step", "rao_blackwell")
    if estimator == "rao_blackwell":
        assert stats.reverse_kl is not None
        cost = stats.reverse_kl.detach()
    else:
        assert stats.teacher_logprob is not None
        cost = stats.student_logprob.detach() - stats.teacher_logprob
    if normalization in ("rate", "neutral"):
        cost = cost - _mean_cost(counts, normalization, mask)
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

    graded = stop == "graded"
    surrogate = policy_gradient_term(stats, returns, clip_ratio, importance_ratio_cap, graded)
    if exact:
        divergence = stats.graded_kl if graded else stats.reverse_kl
        assert divergence is not None
        surrogate = surrogate + divergence
    if stats.weight is not None:
        surrogate = surrogate * stats.weight[:, None]
    per_token = normalization in ("rate", "neutral")
    return (surrogate * mask).sum() / (counts.sequences * (counts.length if per_token else 1.0))


def _mean_cost(counts: Counts, normalization: str, mask: Tensor) -> Tensor | float:
    """Return the cost of an average token: the rate, or [T] means by position, which are the rate
    where no earlier sequence had a token."""
    if normalization == "rate":
        return counts.rate
    assert counts.costs is not None and counts.survival is not None
    means = torch.where(counts.survival > 0, counts.costs / counts.survival, counts.rate)
    size = mask.shape[1]
    padding = (0, max(0, size - len(means)))
    return torch.nn.functional.pad(means, padding, value=counts.rate)[:size].to(mask.device)


def _returns(cost: Tensor, estimator: str, future_weight: float, discount: float) -> Tensor:
    """Compute the [B, T] factors of log q(y_t) from [B, T] costs, which are 0 after the end."""
    if estimator == "reinforce":
        return cost.sum(1, keepdim=True).expand_as(cost)
    future = future_weight * discounted_future(cost, discount)
    return future + cost if estimator == "reward_to_go" else future


def discounted_future(cost: Tensor, discount: float) -> Tensor:
    """Return sum_{u>t} discount^(u-t) cost_u, [B, T] -> [B, T]."""
    pad = torch.nn.functional.pad
    ahead, reach = cost, 1  # sum over t <= u < t + reach; reach doubles until it covers the row
    while reach < cost.shape[1]:
        ahead = ahead + discount**reach * pad(ahead[:, reach:], (0, reach))
        reach *= 2
    return discount * pad(ahead[:, 1:], (0, 1))


def leave_one_out(returns: Tensor, group: Tensor) -> Tensor:
    """Return the [B, T] mean return of the *other* samples of a prompt at the same position.

    Samples that ended before the position count as 0. The result is 0 for a prompt with one sample.
    It is independent of the sample itself, so subtracting it changes no expectation.
    """
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
    """Return the [size] mean return over past batches of the sequences that have a token t, 0 if no
    sequence had one. For reinforce, whose return is the cost of the whole sequence, the mean is
    over all sequences."""
    assert counts.costs is not None and counts.survival is not None
    cost = counts.costs - counts.rate * counts.survival if normalization == "rate" else counts.costs
    survival = counts.survival[:1].expand_as(cost) if estimator == "reinforce" else counts.survival
    means = torch.where(survival > 0, returns_of(cost[None])[0] / survival, 0.0)
    return torch.nn.functional.pad(means, (0, max(0, size - len(means))))[:size].to(device)
