"""Configuration of the DeepSpeed ranks and the optimizer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from seqkd.config.base import BaseConfig, Precision


class LearnerConfig(BaseConfig):
    """The DeepSpeed ranks and the optimizer."""

    ranks: int = Field(1, ge=1)
    """Number of DeepSpeed ranks, one process each."""
    cpus: int = Field(1, ge=1)
    """Number of threads per rank."""
    gpus: float = Field(0.0, ge=0, le=1)
    """Number of GPUs per rank."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """Stage of ZeRO, which shards over the ranks. 1: optimizer states; 2: gradients too; 3: weights
    too."""
    precision: Precision = "float32"
    """Precision of the forward and the backward pass."""
    gradient_checkpointing: bool = False
    """Gradient checkpointing: activations are recomputed in the backward pass instead of kept."""
    compile: bool = False
    """Compilation with torch.compile of the student's layers, and on a CPU of the operations on
    logits, which are always compiled on a GPU. Steps are faster, the first step is slower. Not
    available with zero_stage 3 or adapters."""
    micro_batch_tokens: int = Field(4096, ge=1)
    """Number of tokens in one forward and backward pass, padding included. The samples of a prompt
    are never split: if they alone have more tokens, they form a micro-batch of their own."""
    lr: float = Field(1e-5, gt=0)
    """Learning rate at its peak."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape of the learning rate's decay from its peak to the end of the phase."""
    lr_warmup_steps: int = Field(0, ge=0)
    """Number of steps at the start of each phase over which the learning rate rises."""
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    """Learning rate at the end of the phase, as a share of the peak."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.95,
    )
    """Betas of AdamW."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay of AdamW."""
    max_grad_norm: float = Field(1.0, gt=0)
    """L2 norm to which a larger gradient is scaled down."""

    @model_validator(mode="after")
    def _compiles_whole_weights(self) -> LearnerConfig:
        # Compiled over ZeRO 3's partitioned weights, gradients came out wrong (DeepSpeed 0.19.8).
        if self.compile and self.zero_stage == 3:
            raise ValueError(
                "compile is true, but zero_stage 3 parts the weights that compiled layers read. "
                "Set compile to false, or zero_stage to 2."
            )
        return self
