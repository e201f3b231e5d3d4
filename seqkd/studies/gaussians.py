"""Fits of one Gaussian and of a mixture of two to a mixture of two, under either KL."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from seqkd.objectives import token_forward_kl, token_reverse_kl

GRID = torch.linspace(-15, 15, 3001, dtype=torch.float64)
"""Points at which densities are summed. The mass outside is below 1e-9 for all fits shown."""
WIDTH = (GRID[1] - GRID[0]).item()
"""Width of a grid cell."""
DIVERGENCES = {"forward": token_forward_kl, "reverse": token_reverse_kl}
TEACHER = (
    torch.tensor([[-3.0, 2.5]], dtype=torch.float64),
    torch.tensor([[0.8, 1.2]], dtype=torch.float64).log(),
    torch.tensor([[0.6, 0.4]], dtype=torch.float64).log(),
)
"""Teacher's means, log standard deviations and log weights of the two modes, [1, 2] each."""


def log_density(means: Tensor, log_scales: Tensor, weights: Tensor) -> Tensor:
    """Return [K, points] log-probabilities of the grid cells for [K, C] components. ``weights`` are
    logits."""
    z = (GRID - means[..., None]) / log_scales.exp()[..., None]
    normal = -0.5 * z**2 - log_scales[..., None] - 0.5 * torch.log(torch.tensor(2 * torch.pi))
    mixed = torch.logsumexp(normal + torch.log_softmax(weights, -1)[..., None], 1)
    return mixed + torch.log(torch.tensor(WIDTH))


@dataclass(frozen=True)
class Fit:
    """K fits from K starting points."""

    divergence: Tensor
    """[steps + 1, K] divergence before each step and after the last, nats."""
    means: Tensor
    """[K, C] means of the components."""
    scales: Tensor
    """[K, C] standard deviations of the components."""
    shares: Tensor
    """[K, C] weights of the components."""
    log_density: Tensor
    """[K, points] final log-probabilities of the grid cells."""

    def steps_to_converge(self, within: float = 0.01) -> Tensor:
        """Return [K] the number of steps after which each fit stays within ``within`` nats of its
        final divergence."""
        far = (self.divergence - self.divergence[-1]).abs() > within
        numbers = torch.arange(1, len(far) + 1)[:, None]
        return (far * numbers).amax(0)


def fit(kind: str, means: Tensor, log_scales: Tensor, steps: int = 2000, lr: float = 0.05) -> Fit:
    """Minimize the "forward" or "reverse" KL with Adam from each row of ``means``, [K, C]."""
    log_p = log_density(*TEACHER)
    start = (means, log_scales, torch.zeros_like(means))
    parameters = [p.double().clone().requires_grad_() for p in start]
    optimizer, path = torch.optim.Adam(parameters, lr=lr), []
    for _ in range(steps):
        divergence = DIVERGENCES[kind](log_density(*parameters), log_p)
        path.append(divergence.detach())
        optimizer.zero_grad()
        divergence.sum().backward()  # rows are independent, and Adam is elementwise
        optimizer.step()
    with torch.no_grad():
        density = log_density(*parameters)
        path.append(DIVERGENCES[kind](density, log_p))
        final_means, log_scale, weights = (p.detach() for p in parameters)
    return Fit(torch.stack(path), final_means, log_scale.exp(), torch.softmax(weights, -1), density)


def moments() -> tuple[float, float]:
    """Return the mean and standard deviation of the teacher."""
    p = log_density(*TEACHER)[0].exp()
    mean = (p * GRID).sum()
    return mean.item(), ((p * (GRID - mean) ** 2).sum()).sqrt().item()
