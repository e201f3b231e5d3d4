"""A language small enough to enumerate: 3 tokens (0 ends a sequence), at most 4 tokens long.

The student is a bigram (shared parameters), the teacher a trigram, so no student matches it.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from seqkd.types import TokenStats

VOCAB, HORIZON, EOS = 3, 4, 0
START = VOCAB


def sequences() -> list[tuple[int, ...]]:
    """Every sequence that ends with EOS or at the horizon."""
    found = []
    for length in range(1, HORIZON + 1):
        for tokens in product(range(VOCAB), repeat=length):
            ended = tokens[-1] == EOS
            if EOS not in tokens[:-1] and (ended or length == HORIZON):
                found.append(tokens)
    return found


SEQUENCES = sequences()
MASK = torch.tensor([[t < len(y) for t in range(HORIZON)] for y in SEQUENCES])
TOKENS = torch.tensor([[*y, *[0] * (HORIZON - len(y))] for y in SEQUENCES])
LENGTHS = MASK.sum(1).double()


class Language:
    """Tables over all states of all sequences, as differentiable functions of ``theta``."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.theta = torch.randn(VOCAB + 1, VOCAB, generator=generator, dtype=torch.float64)
        teacher = torch.randn(VOCAB + 1, VOCAB + 1, VOCAB, generator=generator, dtype=torch.float64)
        padded = torch.cat([torch.full((len(TOKENS), 2), START), TOKENS], 1)
        self.last = padded[:, 1:-1]
        self.log_p = torch.log_softmax(2 * teacher[padded[:, :-2], self.last], -1)

    def stats(self, theta: Tensor) -> TokenStats:
        """Statistics of every sequence, [31, 4]."""
        log_q = torch.log_softmax(theta[self.last], -1)

        def drawn(logprobs: Tensor) -> Tensor:
            return logprobs.gather(-1, TOKENS[..., None]).squeeze(-1) * MASK

        return TokenStats(
            loss_mask=MASK,
            group=torch.arange(len(SEQUENCES)),
            student_logprob=drawn(log_q),
            teacher_logprob=drawn(self.log_p),
            reverse_kl=(log_q.exp() * (log_q - self.log_p)).sum(-1) * MASK,
            forward_kl=(self.log_p.exp() * (self.log_p - log_q)).sum(-1) * MASK,
        )

    def probabilities(self, theta: Tensor) -> Tensor:
        """[31] q(y)."""
        return self.stats(theta).student_logprob.sum(1).exp()

    def teacher_probabilities(self) -> Tensor:
        """[31] p(y)."""
        return self.stats(self.theta).teacher_logprob.sum(1).exp()

    def total(self, theta: Tensor) -> Tensor:
        """KL(q || p) = E_q log q(y)/p(y), from the definition over whole sequences."""
        s = self.stats(theta)
        q = self.probabilities(theta)
        return (q * (s.student_logprob.sum(1) - s.teacher_logprob.sum(1))).sum()

    def length(self, theta: Tensor) -> Tensor:
        """E_q[L]."""
        return (self.probabilities(theta) * LENGTHS).sum()

    def rate(self, theta: Tensor) -> Tensor:
        """J = KL(q || p) / E_q[L]."""
        return self.total(theta) / self.length(theta)


def select(stats: TokenStats, rows: list[int], group: list[int]) -> TokenStats:
    """A batch of some of the sequences, repeated as ``rows`` says."""
    picked = {
        name: None if value is None else value[rows]
        for name in ("student_logprob", "teacher_logprob", "reverse_kl", "forward_kl")
        for value in (getattr(stats, name),)
    }
    return TokenStats(loss_mask=stats.loss_mask[rows], group=torch.tensor(group), **picked)


def gradient(function, theta: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    """d function / d theta."""
    theta = theta.clone().requires_grad_()
    return torch.autograd.grad(function(theta), theta)[0]


def finite_difference(function, theta: Tensor, step: float = 1e-6) -> Tensor:  # type: ignore[no-untyped-def]
    """Central differences."""
    result = torch.zeros_like(theta)
    for index in range(theta.numel()):
        shift = torch.zeros_like(theta)
        shift.view(-1)[index] = step
        result.view(-1)[index] = (function(theta + shift) - function(theta - shift)) / (2 * step)
    return result
