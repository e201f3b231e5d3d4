"""Configuration of the processes of a role and of a vLLM engine."""

from __future__ import annotations

from pydantic import Field, field_validator, model_validator

from seqkd.config.base import BaseConfig, Precision


class ActorsConfig(BaseConfig):
    """Processes of a role and the resources of each."""

    actors: int = Field(1, ge=1)
    """Number of processes of the role."""
    cpus: int = Field(1, ge=1)
    """Number of threads per actor."""
    gpus: float = Field(0.0, ge=0)
    """Number of GPUs per actor. A fraction shares a GPU."""

    @field_validator("gpus")
    @classmethod
    def _whole_above_one(cls, value: float) -> float:
        if value > 1 and value != int(value):
            raise ValueError("above 1, gpus must be a whole number.")
        return value


class EngineConfig(ActorsConfig):
    """Actors that each hold a vLLM engine."""

    precision: Precision = "float32"
    """Precision of the engine's weights."""
    tensor_parallel_size: int = Field(1, ge=1)
    """Number of GPUs that share one engine's model."""
    kv_cache_gib: float = Field(1.0, gt=0)
    """Size of the KV cache of an engine on a CPU, in GiB."""
    gpu_memory_utilization: float = Field(0.45, gt=0, le=1)
    """Share of each GPU's memory that an engine takes."""
    max_num_seqs: int = Field(64, ge=1)
    """Largest number of sequences that an engine runs concurrently."""
    enforce_eager: bool | None = None
    """Eager execution, without compilation and CUDA graphs, which starts sooner and samples more
    slowly. If unset: true on a CPU, false on a GPU."""

    @property
    def eager(self) -> bool:
        """True if nothing is compiled."""
        return not self.gpus if self.enforce_eager is None else self.enforce_eager

    @model_validator(mode="after")
    def _gpus_cover_tensor_parallel(self) -> EngineConfig:
        if self.tensor_parallel_size > 1 and self.gpus != self.tensor_parallel_size:
            raise ValueError(
                f"gpus {self.gpus:g} does not equal tensor_parallel_size "
                f"{self.tensor_parallel_size}. Set gpus to the same number."
            )
        return self
