"""Configuration of the actors of a role and of vLLM engines."""

from __future__ import annotations

from pydantic import Field, field_validator, model_validator

from seqkd.config.base import BaseConfig, Precision


class ActorsConfig(BaseConfig):
    """Actors (processes) of a role and the resources of each actor."""

    actors: int = Field(1, ge=1)
    """Number of actors of the role."""
    cpus: int = Field(1, ge=1)
    """Number of CPU cores, and of threads, per actor."""
    gpus: float = Field(0.0, ge=0)
    """Number of GPUs per actor. With a fraction, several actors share a GPU."""

    @field_validator("gpus")
    @classmethod
    def _whole_above_one(cls, value: float) -> float:
        if value > 1 and value != int(value):
            raise ValueError(f"is {value:g}, but above 1 it must be a whole number. Round it.")
        return value


class EngineConfig(ActorsConfig):
    """Actors with one vLLM engine each."""

    precision: Precision = "float32"
    """Precision of the engine's weights."""
    tensor_parallel_size: int = Field(1, ge=1)
    """Number of GPUs over which the model of one engine is sharded."""
    kv_cache_gib: float = Field(1.0, gt=0)
    """Size in GiB of an engine's KV cache on a CPU."""
    gpu_memory_utilization: float = Field(0.45, gt=0, le=1)
    """Fraction of each GPU's memory that an engine uses."""
    max_num_seqs: int = Field(64, ge=1)
    """Maximum number of sequences that an engine processes concurrently."""
    enforce_eager: bool | None = None
    """Eager execution, without compilation and CUDA graphs. The engine starts faster and samples
    more slowly. If unset: true on a CPU, false on a GPU."""

    @property
    def eager(self) -> bool:
        """True if the engine does not compile."""
        return not self.gpus if self.enforce_eager is None else self.enforce_eager

    @model_validator(mode="after")
    def _gpus_cover_tensor_parallel(self) -> EngineConfig:
        if self.tensor_parallel_size > 1 and self.gpus != self.tensor_parallel_size:
            raise ValueError(
                f"gpus is {self.gpus:g}, but tensor_parallel_size is {self.tensor_parallel_size}. "
                f"Set gpus to {self.tensor_parallel_size}."
            )
        return self
