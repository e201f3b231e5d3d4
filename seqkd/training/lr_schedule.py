"""Learning rate over the steps of one phase."""

from __future__ import annotations

import math

from seqkd.config.learner import LearnerConfig


def learning_rate(learner: LearnerConfig, peak: float, step: int, steps: int) -> float:
    """Return the learning rate of ``step`` (counted from 0) of ``steps``: linear warm-up to
    ``peak``, then decay to ``peak * min_lr_ratio`` at the last step."""
    warmup = min(learner.lr_warmup_steps, steps - 1)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    if learner.schedule == "constant":
        remaining = 1.0
    elif learner.schedule == "linear":
        remaining = 1.0 - progress
    else:
        remaining = 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak * (learner.min_lr_ratio + (1.0 - learner.min_lr_ratio) * remaining)
