"""Configuration of the DeepSpeed ranks and the optimizer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from seqkd.config.base import BaseConfig, Precision


class LearnerConfig(BaseConfig):
    """The DeepSpeed ranks and the optimizer."""

    ranks: int = Field(1, ge=1, description="DeepSpeed ranks, a process each.")
    cpus: int = Field(1, ge=1, description="Threads of each rank.")
    gpus: float = Field(0.0, ge=0, le=1, description="GPUs of each rank.")
    zero_stage: Literal[0, 1, 2, 3] = Field(
        2,
        description="What ZeRO splits over the ranks. 1: optimizer state; 2: gradients too; 3: "
        "weights too.",
    )
    precision: Precision = Field("float32", description="Of the forward and backward pass.")
    gradient_checkpointing: bool = Field(
        False, description="Compute activations twice in place of keeping them."
    )
    compile: bool = Field(
        False,
        description="Fuse the student's layers, and on a CPU what is done to logits, as a GPU "
        "always does (torch.compile): faster steps for a slower first one. Not with zero_stage 3 "
        "or adapters.",
    )
    micro_batch_tokens: int = Field(
        4096,
        ge=1,
        description="Tokens in one forward and backward, padding included. The samples of a prompt "
        "are never parted: where they alone are more, they are a micro-batch of their own.",
    )
    lr: float = Field(1e-5, gt=0, description="Learning rate at its peak.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="How it falls from there to the end of the phase."
    )
    lr_warmup_steps: int = Field(0, ge=0, description="Steps of each phase over which it rises.")
    min_lr_ratio: float = Field(
        0.1, ge=0, le=1, description="What is left of it at the end, as a share of the peak."
    )
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.95), description="Of AdamW."
    )
    weight_decay: float = Field(0.0, ge=0, description="Of AdamW.")
    max_grad_norm: float = Field(
        1.0, gt=0, description="L2 norm to which a larger gradient is scaled down."
    )

    @model_validator(mode="after")
    def _compiles_whole_weights(self) -> LearnerConfig:
        # Compiled over ZeRO 3's partitioned weights, gradients came out wrong (DeepSpeed 0.19.8).
        if self.compile and self.zero_stage == 3:
            raise ValueError(
                "compile is true, but zero_stage 3 parts the weights that compiled layers read. "
                "Set compile to false, or zero_stage to 2."
            )
        return self
