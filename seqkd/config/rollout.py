"""Configuration of sampling."""

from __future__ import annotations

from pydantic import Field

from seqkd.config.resources import EngineConfig


class RolloutConfig(EngineConfig):
    """Sampling, by the student or by the teacher."""

    samples_per_prompt: int = Field(4, ge=1)
    """Number of completions per prompt in one step."""
    max_tokens: int = Field(64, ge=1)
    """Largest number of tokens of a completion, answers in the data set included."""
    mask_truncated: bool = False
    """Masking of sampled completions that max_tokens cut: they are dropped from the loss, which
    biases it against long ones. A step in which all completions are cut trains on all of them."""
    max_off_policy_steps: int = Field(0, ge=0, le=1)
    """Number of draws by which the student that samples may be behind the student that is trained.
    1: with placement split, the next draw is sampled and scored while the learner trains."""
    temperature: float = Field(1.0, gt=0)
    """Temperature of sampling. Objectives that are expectations under the student need 1."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Probability mass that is sampled from. Objectives that are expectations under the student
    need 1."""
    teacher_fraction: float = Field(0.2, gt=0, lt=1)
    """Probability that a completion of sampler mixture is the teacher's."""
