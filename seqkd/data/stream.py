"""Order of the training prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from seqkd.types import Prompt


class PromptStream:
    """An endless stream of prompts, shuffled in every epoch. The order depends only on the seed and
    the position."""

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        self.prompts, self.seed = prompts, seed
        self.position = 0
        """Number of prompts taken so far."""

    def take(self, count: int) -> list[Prompt]:
        """Return the next ``count`` prompts, which may span several epochs."""
        size = len(self.prompts)
        places = range(self.position, self.position + count)
        orders = {epoch: self._order(epoch) for epoch in {p // size for p in places}}
        self.position += count
        return [self.prompts[int(orders[p // size][p % size])] for p in places]

    def skip(self, count: int) -> None:
        """Skip the next ``count`` prompts."""
        self.position += count

    def _order(self, epoch: int) -> Any:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.prompts))
