"""Configuration of the budget, the checkpoints and the recovery of lost actors."""

from __future__ import annotations

from pydantic import Field

from seqkd.config.base import BaseConfig, BudgetKind


class BudgetConfig(BaseConfig):
    """Training budget. The main phase ends with the step that uses it up."""

    kind: BudgetKind
    """Unit of the budget, counted over all steps including the warm-up. prompts: prompts used;
    sampled_tokens: completion tokens sampled from the student or the teacher; learner_tokens:
    completion tokens that were trained on; teacher_tokens: completion tokens that the teacher wrote
    plus completion tokens that it scored; seconds: duration of the steps."""
    amount: float = Field(gt=0)
    """Size of the budget in its unit."""


class CheckpointsConfig(BaseConfig):
    """Checkpoints. A checkpoint is always written at the end of a phase and when the run is
    stopped."""

    every_steps: int = Field(100, ge=1)
    """Number of optimizer steps between checkpoints. With updates_per_rollout above 1, the
    checkpoint is written before the next draw of prompts."""
    every_minutes: float = Field(30.0, gt=0)
    """Maximum number of minutes between checkpoints. Whichever of every_steps and every_minutes is
    reached first applies."""
    keep_last: int = Field(2, ge=1)
    """Number of checkpoints to keep."""
    replay_log_gib: float = Field(8.0, ge=0)
    """Maximum disk space in GiB for the teacher's scores since the last checkpoint. Scores beyond
    it are computed again after a crash. Completions are always logged."""


class RecoveryConfig(BaseConfig):
    """Detection and replacement of lost actors."""

    restarts: int = Field(10, ge=0)
    """Maximum number of restarts between two checkpoints. After one more loss, the run is saved and
    fails."""
    backoff_s: float = Field(1.0, ge=0)
    """Delay before the first restart in seconds. It doubles with every restart, up to one
    minute."""
    heartbeat_s: float = Field(60.0, gt=0)
    """Seconds without a heartbeat after which an actor with a pending call is considered hung."""
    stall_s: float = Field(3600.0, gt=0)
    """Seconds after which any single call is considered hung."""
    grace_s: float = Field(60.0, ge=0)
    """Seconds that a running optimizer step may take to finish when the run is stopped."""
