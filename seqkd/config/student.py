"""Configuration of the student: its checkpoint, its initialization, its adapters."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from seqkd.config.base import BaseConfig


class CheckpointInitConfig(BaseConfig):
    """Start from the model as it is."""

    kind: Literal["checkpoint"] = "checkpoint"


class PruneInitConfig(BaseConfig):
    """Start from the model without layers [first, last): depth pruning."""

    kind: Literal["prune"] = "prune"
    drop_layers: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=1)]]
    """Range [first, last) of the layers that are dropped, counted from 0; layer last stays."""

    @field_validator("drop_layers")
    @classmethod
    def _a_range(cls, value: tuple[int, int]) -> tuple[int, int]:
        if value[0] >= value[1]:
            raise ValueError("drop_layers is [first, last) and first must be below last.")
        return value


class LoraConfig(BaseConfig):
    """Low-rank adapters, which are trained in place of the model's own weights (docs/lora.md)."""

    rank: int = Field(16, ge=1)
    """Rank of the adapters."""
    alpha: int = Field(32, ge=1)
    """Scale of the adapters: their output is multiplied by alpha / rank."""
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Linear layers that get adapters, by the last part of their name, such as q_proj. all-linear:
    every linear layer except the output head."""

    @field_validator("targets", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        named = isinstance(value, list | tuple) and value and all(isinstance(n, str) for n in value)
        if value != "all-linear" and not named:
            raise ValueError(
                f"{value!r:.80} is neither all-linear nor a list of names. Set it to all-linear, "
                "or name linear layers of the student, as in [q_proj, v_proj]."
            )
        return value


class StudentConfig(BaseConfig):
    """The model that is trained."""

    model: str
    """Local directory or hub name of the model, in transformers' format."""
    init: Annotated[CheckpointInitConfig | PruneInitConfig, Field(discriminator="kind")] = (
        CheckpointInitConfig()
    )
    """Initialization of the student."""
    lora: LoraConfig | None = None
    """Low-rank adapters. If unset, every weight of the model is trained."""
