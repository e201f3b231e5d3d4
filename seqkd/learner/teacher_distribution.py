"""The teacher's next-token distributions, whole or its most probable tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from seqkd.models.output_head import OutputHead


@dataclass(frozen=True)
class FullTeacher:
    """A teacher known by its hidden states: its whole distribution at every state."""

    hidden: Tensor
    """[N, H']"""
    head: OutputHead
    """Frozen."""


@dataclass(frozen=True)
class TopTeacher:
    """A teacher known by its k most probable tokens. Divergences are those between the two
    distributions over k + 1 events, the k tokens and all others (the tail): true divergences, never
    negative, and never above the divergence of the whole distributions."""

    ids: Tensor
    """[N, k]"""
    logprobs: Tensor
    """[N, k + 1], the tail last."""

    def rows(self, rows: Tensor) -> TopTeacher:
        """The teacher at some of the states."""
        return TopTeacher(self.ids[rows], self.logprobs[rows])


KnownTeacher = FullTeacher | TopTeacher
