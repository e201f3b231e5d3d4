"""The order in which a run takes its prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from seqkd.types import Prompt


class PromptStream:
    """Endless, shuffled anew each epoch; the same for the same seed and position."""

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        self.prompts, self.seed = prompts, seed
        self.position = 0
        """Prompts handed out so far."""

    def take(self, count: int) -> list[Prompt]:
        """The next ``count`` prompts, across the end of an epoch where need be."""
        size = len(self.prompts)
        places = range(self.position, self.position + count)
        orders = {epoch: self._order(epoch) for epoch in {p // size for p in places}}
        self.position += count
        return [self.prompts[int(orders[p // size][p % size])] for p in places]

    def skip(self, count: int) -> None:
        """As :meth:`take`, without the prompts."""
        self.position += count

    def _order(self, epoch: int) -> Any:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.prompts))
