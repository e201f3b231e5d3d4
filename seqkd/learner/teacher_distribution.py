"""The teacher's next-token distributions: complete, or the most probable tokens only."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from seqkd.models.output_head import OutputHead


@dataclass(frozen=True)
class FullTeacher:
    """The teacher's full distributions, as hidden states and an output head."""

    hidden: Tensor
    """[N, H'] last hidden states of the teacher."""
    head: OutputHead
    """Output head of the teacher, frozen."""


@dataclass(frozen=True)
class TopTeacher:
    """The teacher's k most probable tokens.

    Divergences are computed between two distributions over k + 1 events: the k tokens, and all
    other tokens together (the tail). They are true divergences, never negative, and never larger
    than the divergence of the full distributions.
    """

    ids: Tensor
    """[N, k] token ids."""
    logprobs: Tensor
    """[N, k + 1] log-probs, the tail last."""

    def rows(self, rows: Tensor) -> TopTeacher:
        """Select some of the states."""
        return TopTeacher(self.ids[rows], self.logprobs[rows])


KnownTeacher = FullTeacher | TopTeacher
