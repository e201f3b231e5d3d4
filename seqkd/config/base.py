"""Base class and shared types of the configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

TeacherNeed = Literal["nothing", "logprobs", "distribution"]
BudgetKind = Literal["prompts", "sampled_tokens", "learner_tokens", "teacher_tokens", "seconds"]
TrackerName = Literal["mlflow", "trackio", "wandb"]
Precision = Literal["float32", "bfloat16"]


class BaseConfig(BaseModel):
    """A frozen section of the configuration. It rejects unknown keys, infinite numbers and NaN."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )
