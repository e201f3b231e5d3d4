"""The configuration of what keeps a run going: budget, checkpoints, actors that are lost."""

from __future__ import annotations

from pydantic import Field

from seqkd.config.base import BaseConfig, BudgetKind


class BudgetConfig(BaseConfig):
    """What training may cost. The main phase ends with the step that spends it."""

    kind: BudgetKind = Field(
        description="Counted over all steps, the warm-up's too. prompts: drawn; sampled_tokens: of "
        "completions, by student or teacher; learner_tokens: of completions that were learnt from; "
        "teacher_tokens: of completions that the teacher wrote, and of those that it scored; "
        "seconds: of steps.",
    )
    amount: float = Field(gt=0, description="So much of it.")


class CheckpointsConfig(BaseConfig):
    """When the run is saved. At the end of a phase it always is, and when it is told to stop."""

    every_steps: int = Field(
        100, ge=1, description="At the first draw of prompts after so many optimizer steps."
    )
    every_minutes: float = Field(30.0, gt=0, description="Or after so much time, if it is sooner.")
    keep_last: int = Field(2, ge=1, description="Checkpoints that are kept.")
    journal_gib: float = Field(
        8.0,
        ge=0,
        description="Room for the teacher's scores since the last checkpoint; above it they are "
        "asked for again after a crash. Completions are always kept.",
    )


class RecoveryConfig(BaseConfig):
    """How an actor that is lost is noticed, and how often it is replaced."""

    restarts: int = Field(
        10, ge=0, description="Between two checkpoints, before the run is saved and fails."
    )
    backoff_s: float = Field(
        1.0, ge=0, description="Pause before the first restart; doubled each time, up to a minute."
    )
    heartbeat_s: float = Field(
        60.0, gt=0, description="Silence after which the process of a call counts as hung."
    )
    stall_s: float = Field(
        3600.0, gt=0, description="Longest that any one call may take before it counts as hung."
    )
    grace_s: float = Field(
        60.0,
        ge=0,
        description="When told to stop, how long an optimizer step under way may still take.",
    )
