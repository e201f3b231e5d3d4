"""Configuration of the student: checkpoint, initialization and adapters."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from seqkd.config.base import BaseConfig


class CheckpointInitConfig(BaseConfig):
    """Initialization with the weights of the model."""

    kind: Literal["checkpoint"] = "checkpoint"


class PruneInitConfig(BaseConfig):
    """Initialization by depth pruning: the model without some of its layers."""

    kind: Literal["prune"] = "prune"
    drop_layers: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=1)]]
    """Range [first, last) of the layers to drop, counted from 0. Layer `last` is kept."""

    @field_validator("drop_layers")
    @classmethod
    def _a_range(cls, value: tuple[int, int]) -> tuple[int, int]:
        if value[0] >= value[1]:
            raise ValueError(
                f"is [{value[0]}, {value[1]}], but the first number must be below the last. "
                f"To drop only layer {value[0]}, set it to [{value[0]}, {value[0] + 1}]."
            )
        return value


class LoraConfig(BaseConfig):
    """Low-rank adapters, which are trained instead of the model's own weights (docs/lora.md)."""

    rank: int = Field(16, ge=1)
    """Rank of the adapters."""
    alpha: int = Field(32, ge=1)
    """Scale of the adapters, whose output is multiplied by alpha / rank."""
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Linear layers with adapters, by the last part of the layer's name, such as q_proj.
    all-linear: every linear layer except the output head."""

    @field_validator("targets", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        named = isinstance(value, list | tuple) and value and all(isinstance(n, str) for n in value)
        if value != "all-linear" and not named:
            raise ValueError(
                f"{value!r:.80} is neither all-linear nor a list of layer names. Set it to "
                "all-linear, or to linear layers of the student, such as [q_proj, v_proj]."
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
    """Low-rank adapters. If unset: all weights of the model are trained."""
