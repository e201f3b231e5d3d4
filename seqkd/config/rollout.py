"""Configuration of sampling."""

from __future__ import annotations

from pydantic import Field

from seqkd.config.resources import EngineConfig


class RolloutConfig(EngineConfig):
    """Sampling, by the student or by the teacher."""

    samples_per_prompt: int = Field(4, ge=1, description="Completions of a prompt in one step.")
    max_tokens: int = Field(64, ge=1, description="Longest completion, data set answers too.")
    mask_truncated: bool = Field(
        False,
        description="Leave sampled completions that max_tokens cut out of the loss (a bias against "
        "long ones); a step of which all are cut learns from all.",
    )
    max_off_policy_steps: int = Field(
        0,
        ge=0,
        le=1,
        description="How many draws the student that samples may be behind the one that learns. 1: "
        "with placement split the next draw is sampled and scored while the learner is at work.",
    )
    temperature: float = Field(
        1.0, gt=0, description="Of sampling. Objectives that are expectations under q want 1."
    )
    top_p: float = Field(
        1.0, gt=0, le=1, description="Probability mass that is sampled from; likewise."
    )
    teacher_fraction: float = Field(
        0.2, gt=0, lt=1, description="Share of teacher samples under sampler=mixture."
    )
