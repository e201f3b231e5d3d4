"""Languages small enough to enumerate, so that expectations over sequences are exact.

Token 0 (or each of several tokens) ends a sequence. Sequences are cut at the horizon. The student
is a bigram model, so its states share parameters. The teacher is a trigram model, so no student can
match it.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from seqkd.objectives.divergences import graded_kl, without
from seqkd.types import Counts, TokenStats


class Language:
    """Teacher over all N sequences of at most T tokens, and the student as a function of its
    parameters ``theta``: [V + 1, V] float64 logits of the next token given the last token. Row V is
    for the first token."""

    def __init__(
        self, seed: int, vocabulary: int = 3, horizon: int = 4, ends: tuple[int, ...] = (0,)
    ) -> None:
        self.vocabulary, self.horizon, self.ends = vocabulary, horizon, torch.tensor(ends)
        self.sequences = _sequences(vocabulary, horizon, ends)
        self.mask = torch.tensor([[t < len(y) for t in range(horizon)] for y in self.sequences])
        self.tokens = torch.tensor([[*y, *[0] * (horizon - len(y))] for y in self.sequences])
        self.lengths = self.mask.sum(1).double()
        generator = torch.Generator().manual_seed(seed)
        shape = (vocabulary + 1, vocabulary)
        self.theta = torch.randn(shape, generator=generator, dtype=torch.float64)
        """[V + 1, V] initial parameters of the student, far from the teacher."""
        teacher = torch.randn((vocabulary + 1, *shape), generator=generator, dtype=torch.float64)
        padded = torch.cat([torch.full((len(self.tokens), 2), vocabulary), self.tokens], 1)
        self.last = padded[:, 1:-1]
        self.log_p = torch.log_softmax(2 * teacher[padded[:, :-2], self.last], -1)
        """[N, T, V] log-probs of the teacher before each token."""

    def log_q(self, theta: Tensor) -> Tensor:
        """Return [N, T, V] log-probs of the student before each token."""
        return torch.log_softmax(theta[self.last], -1)

    def stats(self, theta: Tensor) -> TokenStats:
        """Return the statistics of all sequences, [N, T], each sequence as its own group."""
        log_q = self.log_q(theta)
        content = self._sampled(log_q - without(log_q, self.ends).logsumexp(-1, keepdim=True))
        return TokenStats(
            loss_mask=self.mask,
            group=torch.arange(len(self.sequences)),
            student_logprob=self._sampled(log_q),
            teacher_logprob=self._sampled(self.log_p),
            reverse_kl=(log_q.exp() * (log_q - self.log_p)).sum(-1) * self.mask,
            forward_kl=(self.log_p.exp() * (self.log_p - log_q)).sum(-1) * self.mask,
            content_logprob=content.masked_fill(torch.isin(self.tokens, self.ends), 0.0),
            graded_kl=graded_kl(log_q, self.log_p, self.ends) * self.mask,
        )

    def student(self, theta: Tensor) -> Tensor:
        """Return [N] student probabilities q(y)."""
        return self._sampled(self.log_q(theta)).sum(1).exp()

    def teacher(self) -> Tensor:
        """Return [N] teacher probabilities p(y)."""
        return self._sampled(self.log_p).sum(1).exp()

    def total(self, theta: Tensor) -> Tensor:
        """Return KL(q || p) = E_q log q(y)/p(y), from the definition over whole sequences."""
        log_q, log_p = (self._sampled(table).sum(1) for table in (self.log_q(theta), self.log_p))
        return (log_q.exp() * (log_q - log_p)).sum()

    def length(self, theta: Tensor) -> Tensor:
        """Return the expected length E_q[L]."""
        return (self.student(theta) * self.lengths).sum()

    def rate(self, theta: Tensor) -> Tensor:
        """Return J = KL(q || p) / E_q[L]."""
        return self.total(theta) / self.length(theta)

    def neutral(self, theta: Tensor) -> Tensor:
        """Return sum_t w_t E[KL_t | the sequence has a token t], where the weights w are constants:
        the student's survival curve at ``theta``, divided by its sum."""
        q, divergence = self.student(theta)[:, None], self.stats(theta).reverse_kl
        assert divergence is not None
        survival = (q * self.mask).sum(0)
        weights = (survival / survival.sum()).detach()
        return (weights * (q * divergence).sum(0) / survival).sum()

    def counts(self, theta: Tensor, sequences: int = 1) -> Counts:
        """Return the counts for ``sequences`` sequences, with exact expectations as estimates."""
        with torch.no_grad():
            q, stats = self.student(theta)[:, None], self.stats(theta)
            assert stats.reverse_kl is not None
            length = self.length(theta).item()
            return Counts(
                sequences=sequences,
                tokens=length * sequences,
                rate=self.rate(theta).item(),
                length=length,
                costs=(q * stats.reverse_kl).sum(0),
                survival=(q * self.mask).sum(0),
            )

    def _sampled(self, table: Tensor) -> Tensor:
        return table.gather(-1, self.tokens[..., None]).squeeze(-1) * self.mask


def gradient(function: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
    """Return the gradient of ``function`` at ``theta``."""
    theta = theta.clone().requires_grad_()
    return torch.autograd.grad(function(theta), theta)[0]


def _sequences(vocabulary: int, horizon: int, ends: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return all sequences that end with an end token or at the horizon."""
    return [
        tokens
        for length in range(1, horizon + 1)
        for tokens in product(range(vocabulary), repeat=length)
        if not set(ends) & set(tokens[:-1]) and (tokens[-1] in ends or length == horizon)
    ]
