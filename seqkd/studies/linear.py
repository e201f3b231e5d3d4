"""A softmax layer without bias, 64 x 64, learnt from teacher layers of several ranks under either
KL."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from seqkd.objectives import token_forward_kl, token_reverse_kl

SIZE = 64
DIVERGENCES = {"forward": token_forward_kl, "reverse": token_reverse_kl}


@dataclass(frozen=True)
class Path:
    """Distances between student and teacher before each step and at the end, [steps + 1]."""

    distribution: Tensor
    """Mean L2 distance of the two output distributions, on inputs never trained on."""
    weights: Tensor
    """L2 distance of the weights over the norm of the teacher's, each without the part that softmax
    cannot see (the mean over outputs)."""


def teacher(rank: int, generator: torch.Generator, logit_scale: float = 3.0) -> Tensor:
    """[64, 64] of ``rank``, scaled so that logits of a standard normal input have that standard
    deviation."""
    left, right = (torch.randn(SIZE, rank, generator=generator) for _ in range(2))
    weight = torch.einsum("ir,jr->ij", left, right)
    return weight.mul(logit_scale * SIZE**0.5 / weight.norm().item())


def train(
    kind: str, rank: int, seed: int, optimizer: str, lr: float, steps: int, batch: int = 256
) -> Path:
    """Learn a teacher of ``rank``; teacher, start and inputs are the same for both kinds of a
    seed."""
    generator = torch.Generator().manual_seed(seed)
    target = teacher(rank, generator)
    student = (0.1 * torch.randn(SIZE, SIZE, generator=generator)).requires_grad_()
    unseen = torch.randn(1024, SIZE, generator=generator)
    step_of = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[optimizer]([student], lr=lr)
    distributions, weights = [], []

    def observe() -> None:
        with torch.no_grad():
            q, p = (torch.softmax(unseen @ w.T, -1) for w in (student, target))
            distributions.append((q - p).norm(dim=-1).mean())
            gap, size = _visible(student - target).norm(), _visible(target).norm()
            weights.append(gap / size)

    for _ in range(steps):
        observe()
        inputs = torch.randn(batch, SIZE, generator=generator)
        log_q, log_p = (torch.log_softmax(inputs @ w.T, -1) for w in (student, target))
        step_of.zero_grad()
        DIVERGENCES[kind](log_q, log_p).mean().backward()
        step_of.step()
    observe()
    return Path(torch.stack(distributions), torch.stack(weights))


def _visible(weight: Tensor) -> Tensor:
    return weight - weight.mean(0, keepdim=True)
