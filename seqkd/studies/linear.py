"""Distillation of a 64 x 64 softmax layer without bias from teacher layers of several ranks, with
forward or reverse KL."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from seqkd.objectives import token_forward_kl, token_reverse_kl

SIZE = 64
DIVERGENCES = {"forward": token_forward_kl, "reverse": token_reverse_kl}


@dataclass(frozen=True)
class Path:
    """Distances between student and teacher before each step and after the last, [steps + 1]."""

    distribution: Tensor
    """Mean L2 distance between the output distributions on unseen inputs."""
    weights: Tensor
    """L2 distance between the weights relative to the norm of the teacher's weights. The mean over
    outputs is subtracted from both, because softmax is invariant to it."""


def teacher(rank: int, generator: torch.Generator, logit_scale: float = 3.0) -> Tensor:
    """Return a [64, 64] matrix of ``rank``, scaled so that the logits of a standard normal input
    have the standard deviation ``logit_scale``."""
    left, right = (torch.randn(SIZE, rank, generator=generator) for _ in range(2))
    weight = torch.einsum("ir,jr->ij", left, right)
    return weight.mul(logit_scale * SIZE**0.5 / weight.norm().item())


def train(
    kind: str, rank: int, seed: int, optimizer: str, lr: float, steps: int, batch: int = 256
) -> Path:
    """Train a student on a teacher of ``rank``. Teacher, initial student and inputs are the same
    for both kinds of KL."""
    generator = torch.Generator().manual_seed(seed)
    target = teacher(rank, generator)
    student = (0.1 * torch.randn(SIZE, SIZE, generator=generator)).requires_grad_()
    unseen = torch.randn(1024, SIZE, generator=generator)
    descent = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[optimizer]([student], lr=lr)
    distributions, weights = [], []

    def observe() -> None:
        with torch.no_grad():
            q, p = (torch.softmax(unseen @ w.T, -1) for w in (student, target))
            distributions.append((q - p).norm(dim=-1).mean())
            gap, size = _centered(student - target).norm(), _centered(target).norm()
            weights.append(gap / size)

    for _ in range(steps):
        observe()
        inputs = torch.randn(batch, SIZE, generator=generator)
        log_q, log_p = (torch.log_softmax(inputs @ w.T, -1) for w in (student, target))
        descent.zero_grad()
        DIVERGENCES[kind](log_q, log_p).mean().backward()
        descent.step()
    observe()
    return Path(torch.stack(distributions), torch.stack(weights))


def _centered(weight: Tensor) -> Tensor:
    return weight - weight.mean(0, keepdim=True)
