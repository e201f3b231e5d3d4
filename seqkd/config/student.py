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
    drop_layers: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=1)]] = Field(
        description="[first, last): the layers that are left out, counted from 0; last stays."
    )

    @field_validator("drop_layers")
    @classmethod
    def _a_range(cls, value: tuple[int, int]) -> tuple[int, int]:
        if value[0] >= value[1]:
            raise ValueError("drop_layers is [first, last) and first must be below last.")
        return value


class LoraConfig(BaseConfig):
    """Low-rank adapters, which learn in place of the model's own weights (docs/lora.md)."""

    rank: int = Field(16, ge=1, description="Rows of A and columns of B, which the adapters learn.")
    alpha: int = Field(32, ge=1, description="What the adapters add is scaled by alpha / rank.")
    targets: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear",
        description="Linear layers by the last part of their name, such as q_proj; all-linear: "
        "every one but the output head.",
    )

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
    """The model that learns."""

    model: str = Field(description="A local directory or a hub name, in transformers' format.")
    init: Annotated[CheckpointInitConfig | PruneInitConfig, Field(discriminator="kind")] = Field(
        CheckpointInitConfig(), description="What it begins as."
    )
    lora: LoraConfig | None = Field(None, description="Left out: every weight of the model learns.")
