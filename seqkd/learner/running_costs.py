"""Running estimates over past batches: the cost of a sequence by position, and from it the rate
J = E[sum_t KL_t] / E[L] and the expected length E[L]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from seqkd.types import Counts, Rollout, add_padded

DECAY = 0.5
"""Weight of the past. A long memory lags behind a falling divergence: the rate is then too high and
every further token seems cheap, which rewards length."""


class RunningCosts:
    """Sums of past batches, decayed, so that an estimate never depends on the batch it is used
    on (the very first one excepted)."""

    def __init__(self) -> None:
        self.costs: Tensor | None = None
        self.survival: Tensor | None = None

    @property
    def known(self) -> bool:
        """Whether any batch has been seen."""
        return self.costs is not None

    def update(self, costs: Tensor | None, survival: Tensor | None) -> None:
        """Add a batch's :attr:`~seqkd.types.PartResult.costs` and ``survival``."""
        if costs is None or survival is None or not survival.sum() > 0:
            return
        decayed = (None if v is None else DECAY * v for v in (self.costs, self.survival))
        self.costs, self.survival = map(add_padded, decayed, (costs, survival))

    def counts(self, rollouts: Sequence[Rollout]) -> Counts:
        """What the next step divides by and compares with."""
        sequences, tokens = len(rollouts), sum(len(r.completion_ids) for r in rollouts)
        if self.costs is None or self.survival is None:
            return Counts(sequences, tokens)
        total, length = self.costs.sum().item(), self.survival.sum().item()
        return Counts(
            sequences,
            tokens,
            rate=total / length,
            length=length / self.survival[0].item(),
            costs=self.costs,
            survival=self.survival,
        )


def by_position(rows: Sequence[tuple[float, Sequence[float]]]) -> tuple[Tensor, Tensor]:
    """Weighted costs of sequences -> ([T] their sum, [T] the weight survival) at each position."""
    longest = max(len(costs) for _, costs in rows)
    total, survival = torch.zeros(longest), torch.zeros(longest)
    for weight, costs in rows:
        total[: len(costs)] += weight * torch.tensor(costs)
        survival[: len(costs)] += weight
    return total, survival
