"""Configuration of the processes of a role and of a vLLM engine."""

from __future__ import annotations

from pydantic import Field, field_validator, model_validator

from seqkd.config.base import BaseConfig, Precision


class ActorsConfig(BaseConfig):
    """How many processes a role has and what each of them gets."""

    actors: int = Field(1, ge=1, description="Processes of the role.")
    cpus: int = Field(1, ge=1, description="Threads of each actor.")
    gpus: float = Field(0.0, ge=0, description="GPUs of each actor; a fraction shares one.")

    @field_validator("gpus")
    @classmethod
    def _whole_above_one(cls, value: float) -> float:
        if value > 1 and value != int(value):
            raise ValueError("above 1, gpus must be a whole number.")
        return value


class EngineConfig(ActorsConfig):
    """Actors that each hold a vLLM engine."""

    precision: Precision = Field("float32", description="Of the engine's weights.")
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs that share one engine's model.")
    kv_cache_gib: float = Field(1.0, gt=0, description="KV cache of an engine on a CPU.")
    gpu_memory_utilization: float = Field(0.45, gt=0, le=1, description="Share of each GPU.")
    max_num_seqs: int = Field(64, ge=1, description="Sequences an engine runs at once.")
    enforce_eager: bool | None = Field(
        None,
        description="Nothing compiled, no CUDA graphs: starts sooner, samples slower; left out: on "
        "a CPU alone.",
    )

    @property
    def eager(self) -> bool:
        """Whether nothing is compiled."""
        return not self.gpus if self.enforce_eager is None else self.enforce_eager

    @model_validator(mode="after")
    def _gpus_cover_tensor_parallel(self) -> EngineConfig:
        if self.tensor_parallel_size > 1 and self.gpus != self.tensor_parallel_size:
            raise ValueError(
                f"gpus {self.gpus:g} does not equal tensor_parallel_size "
                f"{self.tensor_parallel_size}. Set gpus to the same number."
            )
        return self
