"""Configuration of the DeepSpeed ranks and the optimizer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from seqkd.config.base import BaseConfig, Precision


class LearnerConfig(BaseConfig):
    """DeepSpeed ranks and optimizer."""

    ranks: int = Field(1, ge=1)
    """Number of DeepSpeed ranks, one process each."""
    cpus: int = Field(1, ge=1)
    """Number of CPU cores, and of threads, per rank."""
    gpus: float = Field(0.0, ge=0, le=1)
    """Number of GPUs per rank."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """Stage of ZeRO sharding over the ranks. 0: none; 1: optimizer states; 2: also gradients; 3:
    also weights."""
    precision: Precision = "float32"
    """Precision of the forward and the backward pass."""
    gradient_checkpointing: bool = False
    """Gradient checkpointing: activations are recomputed in the backward pass, which saves memory
    and costs time."""
    compile: bool = False
    """Compilation of the student's layers with torch.compile. Steps are faster, the first step is
    slower. On a CPU the operations on logits are compiled too; on a GPU they always are. Not
    available with zero_stage 3 or adapters."""
    micro_batch_tokens: int = Field(4096, ge=1)
    """Maximum number of tokens in one forward and backward pass, including padding. The samples of
    a prompt are never split: if they have more tokens, they form a larger micro-batch."""
    lr: float = Field(1e-5, gt=0)
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Schedule of the learning rate from its peak to the end of the phase."""
    lr_warmup_steps: int = Field(0, ge=0)
    """Number of steps at the start of each phase over which the learning rate rises to its peak."""
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    """Learning rate at the end of the phase, as a fraction of the peak."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.95,
    )
    """AdamW betas."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW weight decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Maximum L2 norm of the gradient. Larger gradients are clipped to it."""

    @model_validator(mode="after")
    def _compiles_whole_weights(self) -> LearnerConfig:
        # With layers compiled over ZeRO-3's sharded weights, gradients were wrong
        # (DeepSpeed 0.19.8).
        if self.compile and self.zero_stage == 3:
            raise ValueError(
                "compile is true, but compiled layers do not work with the sharded weights of "
                "zero_stage 3. Set compile to false, or zero_stage to 2."
            )
        return self
