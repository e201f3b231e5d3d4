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
        self.alive: Tensor | None = None

    @property
    def known(self) -> bool:
        """Whether any batch has been seen."""
        return self.costs is not None

    def update(self, costs: Tensor | None, alive: Tensor | None) -> None:
        """Add a batch's :attr:`~seqkd.types.PartResult.costs` and ``alive``."""
        if costs is None or alive is None or not alive.sum() > 0:
            return
        decayed = (None if v is None else DECAY * v for v in (self.costs, self.alive))
        self.costs, self.alive = map(add_padded, decayed, (costs, alive))

    def counts(self, rollouts: Sequence[Rollout]) -> Counts:
        """What the next step divides by and compares with."""
        sequences, tokens = len(rollouts), sum(len(r.completion_ids) for r in rollouts)
        if self.costs is None or self.alive is None:
            return Counts(sequences, tokens)
        total, length = self.costs.sum().item(), self.alive.sum().item()
        return Counts(
            sequences,
            tokens,
            rate=total / length,
            length=length / self.alive[0].item(),
            costs=self.costs,
            alive=self.alive,
        )


def by_position(rows: Sequence[tuple[float, Sequence[float]]]) -> tuple[Tensor, Tensor]:
    """Weighted costs of sequences -> ([T] their sum, [T] the weight alive) at each position."""
    longest = max(len(costs) for _, costs in rows)
    total, alive = torch.zeros(longest), torch.zeros(longest)
    for weight, costs in rows:
        total[: len(costs)] += weight * torch.tensor(costs)
        alive[: len(costs)] += weight
    return total, alive
