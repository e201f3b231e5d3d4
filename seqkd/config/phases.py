"""Configuration of the terms of the loss and of the training phases."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from seqkd.config.base import BaseConfig
from seqkd.config.objectives import ObjectiveConfig, Unit
from seqkd.config.samplers import SAMPLERS, SamplerName


class TermConfig(BaseConfig):
    """One term of the loss: a sampler and an objective."""

    sampler: SamplerName = Field(
        "student",
        description="Source of the completions that the term trains on. "
        + "; ".join(f"{name}: {traits.label}" for name, traits in SAMPLERS.items())
        + ".",
    )
    objective: ObjectiveConfig
    """Objective of the term. If unset: the default objective of the sampler."""
    weight: float = Field(1.0, gt=0)
    """Weight of the term in the loss."""
    unit: Unit | None = None
    """Unit of the term: nats per token or per sequence, converted with the mean length of the
    step's completions. All terms of a phase must have the same unit. If unset: the unit of the
    objective, which is sequence for sequence_forward_kl and for sequence_reverse_kl with
    normalization total or minillm, and token for all others."""

    @property
    def loss_unit(self) -> Unit:
        """Unit of the term's loss."""
        return self.unit or self.objective.unit

    @model_validator(mode="before")
    @classmethod
    def _natural_objective(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        # An unknown sampler is reported by its own field, without a missing objective.
        traits = SAMPLERS.get(str(data.get("sampler")), SAMPLERS["student"])
        options = data.get("objective") or {}
        if isinstance(options, dict):
            data = {**data, "objective": {"kind": traits.objective, **options}}
        return data

    @model_validator(mode="after")
    def _sampler_fits_objective(self) -> TermConfig:
        if self.sampler not in self.objective.samplers:
            fits = " or ".join(self.objective.samplers)
            raise ValueError(
                f"objective {self.objective.kind!r} cannot use sampler {self.sampler!r}: it is "
                f"defined on samples of the {fits}. Set sampler to {fits}, or remove objective to "
                f"get the default, {SAMPLERS[self.sampler].objective!r}."
            )
        return self


class PhaseConfig(TermConfig):
    """One training phase: a term of the loss, and optional extra terms."""

    extra_terms: tuple[TermConfig, ...] = ()
    """Additional terms of the loss, each with its own weight."""
    steps: int = Field(ge=1)
    """Number of optimizer steps."""
    prompts_per_step: int = Field(4, ge=1)
    """Number of prompts (or answers, or texts) per step for each sampler."""
    updates_per_rollout: int = Field(1, ge=1)
    """Number of optimizer steps that share one set of rollouts. Above 1, all steps except the first
    train on samples of an older student."""

    @model_validator(mode="after")
    def _weights_are_of_the_mixture_that_drew(self) -> PhaseConfig:
        if self.weighs_a_mixture and self.updates_per_rollout > 1:
            raise ValueError(
                f"updates_per_rollout is {self.updates_per_rollout}, which trains on samples of an "
                "older student, but sampler 'mixture' computes importance weights with the current "
                "student. Set it to 1."
            )
        return self

    @model_validator(mode="after")
    def _terms_have_one_unit(self) -> PhaseConfig:
        for index, term in enumerate(self.extra_terms):
            if term.loss_unit != self.loss_unit:
                raise ValueError(
                    f"extra_terms.{index} ({term.objective.kind}) is in nats per {term.loss_unit}, "
                    f"but the phase's own term ({self.objective.kind}) is in nats per "
                    f"{self.loss_unit}. Set extra_terms.{index}.unit to {self.loss_unit}, or unit "
                    f"to {term.loss_unit}."
                )
        return self

    @property
    def weighs_a_mixture(self) -> bool:
        """True if completions have importance weights of a mixture with the current student."""
        return any(SAMPLERS[t.sampler].weighted and t.objective.on_policy for t in self.terms)

    @property
    def terms(self) -> tuple[TermConfig, ...]:
        """All terms of the loss."""
        return (self, *self.extra_terms)

    @property
    def by_sampler(self) -> dict[SamplerName, tuple[TermConfig, ...]]:
        """Terms grouped by sampler, the phase's own sampler first. The terms of a sampler train on
        the same completions."""
        names = dict.fromkeys(term.sampler for term in self.terms)
        return {name: tuple(t for t in self.terms if t.sampler == name) for name in names}


class WarmupConfig(PhaseConfig):
    """A training phase before the main phase, with its own sampler and learning rate."""

    samples_per_prompt: int = Field(1, ge=1)
    """Number of completions per prompt in a step of the warm-up."""
    lr: float | None = Field(None, gt=0)
    """Peak learning rate of the warm-up. If unset: learner.lr."""
