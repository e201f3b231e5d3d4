"""Configuration of the budget, the checkpoints and the recovery of lost actors."""

from __future__ import annotations

from pydantic import Field

from seqkd.config.base import BaseConfig, BudgetKind


class BudgetConfig(BaseConfig):
    """Budget of training. The main phase ends with the step that spends it."""

    kind: BudgetKind
    """Unit of the budget, counted over all steps, those of the warm-up included. prompts: prompts
    drawn; sampled_tokens: tokens of completions by student or teacher; learner_tokens: tokens of
    completions that were trained on; teacher_tokens: tokens of completions that the teacher wrote,
    plus those that it scored; seconds: time of steps."""
    amount: float = Field(gt=0)
    """Size of the budget in its unit."""


class CheckpointsConfig(BaseConfig):
    """Checkpoints. One is always written at the end of a phase and when the run is told to stop."""

    every_steps: int = Field(100, ge=1)
    """Number of optimizer steps between checkpoints. A checkpoint is written at the first draw of
    prompts after them."""
    every_minutes: float = Field(30.0, gt=0)
    """Longest time between checkpoints in minutes, if it is reached before every_steps."""
    keep_last: int = Field(2, ge=1)
    """Number of checkpoints to keep."""
    replay_log_gib: float = Field(8.0, ge=0)
    """Space in GiB for the teacher's scores since the last checkpoint. Above it, scores are
    requested again after a crash. Completions are always kept."""


class RecoveryConfig(BaseConfig):
    """Detection and replacement of lost actors."""

    restarts: int = Field(10, ge=0)
    """Number of restarts between two checkpoints before the run is saved and fails."""
    backoff_s: float = Field(1.0, ge=0)
    """Pause before the first restart in seconds. It doubles with each restart, up to a minute."""
    heartbeat_s: float = Field(60.0, gt=0)
    """Seconds without a heartbeat after which the process of a call counts as hung."""
    stall_s: float = Field(3600.0, gt=0)
    """Seconds after which any single call counts as hung."""
    grace_s: float = Field(60.0, ge=0)
    """Seconds that a running optimizer step may still take when the run is told to stop."""
