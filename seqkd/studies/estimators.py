"""Study of the estimators on enumerated languages: exact bias, direction and variance, and the
students after training to convergence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from seqkd.objectives import sampled_token, sequence_reverse_kl, token_mean
from seqkd.studies.enumerated import Language, gradient
from seqkd.types import Counts, TokenStats

CHUNK = 256
"""Number of sample tuples per chunk."""


@dataclass(frozen=True)
class Row:
    """Estimator of the gradient of ``definition``, a method of :class:`Language`."""

    name: str
    unbiased: bool
    options: dict[str, Any] = field(default_factory=dict)
    function: Callable[..., Tensor] = sequence_reverse_kl
    samples: int = 1
    definition: str = "total"

    def loss(self, stats: TokenStats, counts: Counts) -> Tensor:
        """Return the surrogate loss of a batch."""
        return self.function(stats, counts, **self.options)


def _row(name: str, unbiased: bool, samples: int = 1, **options: Any) -> Row:
    baseline = options.pop("baseline", "none" if samples == 1 else "leave_one_out")
    normalization = options.pop("normalization", "total")
    definition = normalization if normalization in ("rate", "neutral") else "total"
    options = {"baseline": baseline, "normalization": normalization, **options}
    return Row(name, unbiased, options, samples=samples, definition=definition)


ROWS = (
    _row("reinforce", True, estimator="reinforce"),
    _row("reward_to_go", True, estimator="reward_to_go"),
    _row("reward_to_go, leave-one-out of 4", True, 4, estimator="reward_to_go"),
    _row("single_step", True, estimator="single_step"),
    _row("rao_blackwell", True),
    _row("rao_blackwell, position_mean", True, baseline="position_mean"),
    _row("rao_blackwell, leave-one-out of 2", True, 2),
    _row("rao_blackwell, leave-one-out of 4", True, 4),
    _row("minillm", False, normalization="minillm"),
    _row("minillm, leave-one-out of 4", False, 4, normalization="minillm"),
    _row("future_weight 0.5", False, future_weight=0.5),
    _row("discount 0.8", False, discount=0.8),
    Row("token_reverse_kl", False, function=token_mean),
    Row("sampled_token", False, function=sampled_token),
)


@dataclass(frozen=True)
class Quality:
    """Quality of an estimator compared with the exact gradient."""

    bias: float
    """Largest absolute component of the expected estimate minus the exact gradient."""
    cosine: float
    """Cosine of the expected estimate and the exact gradient."""
    variance: float
    """Trace of the covariance times the number of sequences used."""


def quality(language: Language, theta: Tensor, row: Row) -> Quality:
    """Compute the exact quality by enumeration of all tuples of ``row.samples`` sequences."""
    exact = gradient(getattr(language, row.definition), theta).flatten()
    mean, square = torch.zeros_like(exact), 0.0
    for chance, gradients in _gradients(language, theta, row):
        mean += chance @ gradients
        square += (chance * (gradients**2).sum(1)).sum().item()
    return Quality(
        bias=(mean - exact).abs().max().item(),
        cosine=torch.cosine_similarity(mean, exact, dim=0).item(),
        variance=row.samples * (square - (mean**2).sum().item()),
    )


def _gradients(language: Language, theta: Tensor, row: Row) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ([n] probabilities, [n, P] gradients with respect to ``theta``) of all tuples, in
    chunks.

    A surrogate loss depends on ``theta`` only through the log-probs and divergences of its tokens.
    Their derivatives are computed once for all tokens of the language and combined here.
    """
    stats = language.stats(theta)
    jacobian = {
        name: torch.autograd.functional.jacobian(
            lambda at, name=name: getattr(language.stats(at), name), theta
        ).flatten(2)
        for name in ("student_logprob", "reverse_kl")
    }
    counts = language.counts(theta, row.samples)
    if row.function is not sequence_reverse_kl:  # normalize per sequence, like sequence_reverse_kl
        counts = replace(counts, tokens=float(row.samples))
    q = language.student(theta)
    tuples = torch.tensor(list(product(range(len(q)), repeat=row.samples)))
    for part in tuples.split(CHUNK):
        rows = part.flatten()
        group = torch.arange(len(part)).repeat_interleave(row.samples)
        leaves = {n: getattr(stats, n)[rows].detach().requires_grad_() for n in jacobian}
        assert stats.teacher_logprob is not None
        batch = TokenStats(
            loss_mask=stats.loss_mask[rows],
            group=group,
            student_logprob=leaves["student_logprob"],
            teacher_logprob=stats.teacher_logprob[rows],
            reverse_kl=leaves["reverse_kl"],
            divergence=leaves["reverse_kl"],
        )
        factors = torch.autograd.grad(
            row.loss(batch, counts), list(leaves.values()), allow_unused=True
        )
        gradients = torch.zeros(len(rows), theta.numel(), dtype=theta.dtype)
        for factor, table in zip(factors, jacobian.values(), strict=True):
            if factor is not None:
                gradients += torch.einsum("bt,btp->bp", factor, table[rows])
        yield q[part].prod(1), gradients.view(len(part), row.samples, -1).sum(1)


TRAINED: dict[str, Row] = {
    "total": _row("total", True),
    "rate": _row("rate", True, normalization="rate"),
    "neutral": _row("neutral", True, normalization="neutral"),
    "minillm": _row("minillm", False, normalization="minillm"),
    "neutral, graded": _row(
        "neutral, graded, discount 0.8", False, normalization="neutral", stop="graded", discount=0.8
    ),
    "discount 0.8": _row("rate, discount 0.8", False, normalization="rate", discount=0.8),
    "token level": Row("token_reverse_kl", False, function=token_mean),
}


@dataclass(frozen=True)
class Outcome:
    """Exact metrics of a trained student: total (nats), rate (nats per token), length (tokens)."""

    total: float
    rate: float
    length: float


def describe(language: Language, theta: Tensor) -> Outcome:
    """Compute the exact metrics of a student."""
    values = (getattr(language, name)(theta).item() for name in ("total", "rate", "length"))
    return Outcome(*values)


def warm_up(language: Language) -> Tensor:
    """Return the ``theta`` with the lowest forward KL to the teacher over whole sequences, which is
    the limit of training on teacher samples."""
    p = language.teacher()
    return descend(language.theta, lambda theta: -(p * language.student(theta).log()).sum())


def train(language: Language, row: Row, start: Tensor) -> Tensor:
    """Return ``theta`` after gradient descent with the exact expectation of the estimated
    gradient."""

    def expected_loss(theta: Tensor) -> Tensor:
        stats, q = language.stats(theta), language.student(theta.detach())
        assert stats.reverse_kl is not None
        stats = replace(stats, weight=q, divergence=stats.reverse_kl * q[:, None])
        return row.loss(stats, language.counts(theta.detach()))

    return descend(start, expected_loss)


def descend(start: Tensor, loss: Callable[[Tensor], Tensor], steps: int = 1500) -> Tensor:
    """Run ``steps`` of Adam with a learning rate that decays linearly from 0.03 to 0."""
    theta = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([theta], lr=0.03)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(theta).backward()
        optimizer.step()
        schedule.step()
    return theta.detach()


def teacher_length(language: Language) -> float:
    """Return the expected length E_p[L] of the teacher."""
    return (language.teacher() * language.lengths).sum().item()
