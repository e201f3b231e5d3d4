"""Configuration of the rollouts."""

from __future__ import annotations

from pydantic import Field

from seqkd.config.resources import EngineConfig


class RolloutConfig(EngineConfig):
    """Sampling of completions, and the student's vLLM engines."""

    samples_per_prompt: int = Field(4, ge=1)
    """Number of completions per prompt and step."""
    max_tokens: int = Field(64, ge=1)
    """Maximum number of tokens per completion, including answers from the data set."""
    mask_truncated: bool = False
    """Exclusion of sampled completions that were truncated at max_tokens from the loss, which
    biases it against long completions. If all completions of a step are truncated, the step uses
    all of them."""
    max_off_policy_steps: int = Field(0, ge=0, le=1)
    """Number of draws by which the sampling student may lag behind the trained student. 1 requires
    placement split: the next draw is sampled and scored while the learner trains."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature. Objectives that are expectations under the student require 1."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Top-p (nucleus) sampling. Objectives that are expectations under the student require 1."""
    teacher_fraction: float = Field(0.2, gt=0, lt=1)
    """Probability that a completion of sampler mixture is sampled from the teacher."""
