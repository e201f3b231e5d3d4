"""The running estimate of the rate J = E[sum_t KL_t] / E[L] and of the expected length E[L]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from seqkd.types import Counts, Rollout

DECAY = 0.9
"""Weight of the past: about ten batches, so that the estimate follows the student."""


class RunningRate:
    """Sums of past batches, decayed, so that an estimate never depends on the batch it is used
    on (the very first one excepted)."""

    def __init__(self) -> None:
        self.divergence = self.tokens = self.sequences = 0.0

    @property
    def known(self) -> bool:
        """Whether any batch has been seen."""
        return self.tokens > 0

    def update(self, sums: Mapping[str, float]) -> None:
        """Add a batch's :attr:`~seqkd.types.StepResult.sums`. Without the exact divergence, the
        sampled log-ratio stands in: it has the same mean."""
        if "reverse_kl" in sums:
            divergence = sums["reverse_kl"]
        elif "teacher_logprob" in sums:
            divergence = sums["student_logprob"] - sums["teacher_logprob"]
        else:
            return
        self.divergence = DECAY * self.divergence + divergence
        self.tokens = DECAY * self.tokens + sums["tokens"]
        self.sequences = DECAY * self.sequences + sums["sequences"]

    def counts(self, rollouts: Sequence[Rollout]) -> Counts:
        """What the next step divides by."""
        tokens = sum(len(r.completion_ids) for r in rollouts)
        if not self.known:
            return Counts(sequences=len(rollouts), tokens=tokens)
        return Counts(
            sequences=len(rollouts),
            tokens=tokens,
            rate=self.divergence / self.tokens,
            length=self.tokens / self.sequences,
        )
