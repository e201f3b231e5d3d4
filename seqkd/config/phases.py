"""Configuration of a loss: its terms, and the phases that minimize it."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from seqkd.config.base import BaseConfig, SamplerName
from seqkd.config.objectives import NATURAL_OBJECTIVE, ObjectiveConfig


class TermConfig(BaseConfig):
    """One summand of a loss: whose completions, which objective."""

    sampler: SamplerName = Field(
        "student",
        description="Whose completions are learnt from. mixture: each from the teacher with "
        "probability rollout.teacher_fraction; dataset: the rows' answers; corpus: plain text; "
        "journal: what seqkd precompute recorded.",
    )
    objective: ObjectiveConfig = Field(description="Left out: the natural one of the sampler.")
    weight: float = Field(1.0, gt=0, description="Factor of the term in the loss.")

    @model_validator(mode="before")
    @classmethod
    def _natural_objective(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        natural = NATURAL_OBJECTIVE.get(str(data.get("sampler", "student")))
        given = data.get("objective") or {}
        if natural and isinstance(given, dict):
            data = {**data, "objective": {"kind": natural, **given}}
        return data

    @model_validator(mode="after")
    def _sampler_fits_objective(self) -> TermConfig:
        if self.sampler not in self.objective.samplers:
            fits = " or ".join(self.objective.samplers)
            raise ValueError(
                f"objective {self.objective.kind!r} cannot use sampler {self.sampler!r}: it is "
                f"defined on samples of the {fits}. Set sampler to {fits}, or leave the "
                f"objective out to get {NATURAL_OBJECTIVE[self.sampler]!r}."
            )
        return self


class PhaseConfig(TermConfig):
    """One stretch of training: a term, and more terms that are added to it."""

    plus: tuple[TermConfig, ...] = Field(
        (), description="Terms added to the loss, each with a weight."
    )
    steps: int = Field(ge=1, description="Optimizer steps; with a budget at most so many.")
    prompts_per_step: int = Field(
        4, ge=1, description="Prompts (answers, texts) a step from each sampler."
    )
    updates_per_rollout: int = Field(
        1,
        ge=1,
        description="Optimizer steps on what is sampled at once; above 1 all but the first learn "
        "from samples of an older student.",
    )

    @model_validator(mode="after")
    def _weights_are_of_the_mixture_that_drew(self) -> PhaseConfig:
        if self.weighs_a_mixture and self.updates_per_rollout > 1:
            raise ValueError(
                f"updates_per_rollout {self.updates_per_rollout} learns from samples of an older "
                "student, but the weights of sampler 'mixture' are those of today's. Set it to 1."
            )
        return self

    @property
    def weighs_a_mixture(self) -> bool:
        """Whether completions have the importance weights of a mixture with today's student."""
        return any(t.sampler == "mixture" and t.objective.on_policy for t in self.terms)

    @property
    def terms(self) -> tuple[TermConfig, ...]:
        """Every summand of the loss."""
        return (self, *self.plus)

    @property
    def by_sampler(self) -> dict[SamplerName, tuple[TermConfig, ...]]:
        """The terms that learn from the same completions, the phase's own sampler first."""
        names = dict.fromkeys(term.sampler for term in self.terms)
        return {name: tuple(t for t in self.terms if t.sampler == name) for name in names}


class WarmupConfig(PhaseConfig):
    """A phase before the main one, with its own samples and learning rate."""

    samples_per_prompt: int = Field(1, ge=1, description="As rollout.samples_per_prompt.")
    lr: float | None = Field(None, gt=0, description="learner.lr if left out.")
