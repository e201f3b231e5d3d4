"""What every part of the configuration is made of."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

SamplerName = Literal["student", "teacher", "mixture", "dataset", "corpus", "journal"]
TeacherNeed = Literal["nothing", "logprobs", "distribution"]
BudgetKind = Literal["prompts", "sampled_tokens", "learner_tokens", "teacher_tokens", "seconds"]
TrackerName = Literal["mlflow", "trackio", "wandb"]
Precision = Literal["float32", "bfloat16"]


class BaseConfig(BaseModel):
    """Frozen; unknown keys and infinite numbers are refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=()
    )
