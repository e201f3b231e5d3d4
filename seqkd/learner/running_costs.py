"""Running estimates over past batches: the cost of a sequence at every position, the rate
J = E[sum_t KL_t] / E[L], and the expected length E[L]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from seqkd.types import Counts, Rollout, add_padded

DECAY = 0.5
"""Weight of past batches at every update. With a larger value the estimates lag behind a falling
divergence: the rate is too high, further tokens appear cheap, and long outputs are rewarded."""


class RunningCosts:
    """Decayed sums over past batches. An estimate does not depend on the batch that it is used for,
    except for the first batch."""

    def __init__(self) -> None:
        self.costs: Tensor | None = None
        self.survival: Tensor | None = None

    @property
    def known(self) -> bool:
        """True after the first update."""
        return self.costs is not None

    def update(self, costs: Tensor | None, survival: Tensor | None) -> None:
        """Add the :attr:`~seqkd.types.PartResult.costs` and ``survival`` of a batch."""
        if costs is None or survival is None or not survival.sum() > 0:
            return
        decayed = (None if v is None else DECAY * v for v in (self.costs, self.survival))
        self.costs, self.survival = map(add_padded, decayed, (costs, survival))

    def counts(self, rollouts: Sequence[Rollout]) -> Counts:
        """Return the normalizers and estimates for the next step."""
        return self.counts_of(len(rollouts), sum(len(r.completion_ids) for r in rollouts))

    def counts_of(self, sequences: int, tokens: int) -> Counts:
        """Return :meth:`counts` for a number of completions and of their tokens."""
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
    """Sum costs and weights over sequences at every position.

    Args:
        rows: Weight and per-token costs of every sequence.

    Returns:
        [T] weighted sum of costs, and [T] sum of the weights of the sequences that have a token at
        the position.
    """
    longest = max(len(costs) for _, costs in rows)
    total, survival = torch.zeros(longest), torch.zeros(longest)
    for weight, costs in rows:
        total[: len(costs)] += weight * torch.tensor(costs)
        survival[: len(costs)] += weight
    return total, survival
