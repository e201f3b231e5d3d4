"""Configuration of the alarms."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from seqkd.config.base import BaseConfig

Warned = Annotated[float | None, Field(description="Level at which the run warns.")]
Stopped = Annotated[float | None, Field(description="Level at which the run stops.")]


class AlarmConfig(BaseConfig):
    """Levels at which a figure warns and stops the run, null for never. The figure is the mean over
    the last five steps."""

    low_is_bad: ClassVar[bool] = False
    warn: Warned
    stop: Stopped = Field(None, ge=0)

    def reached(self, level: float | None, value: float) -> bool:
        """Return whether ``value`` is as bad as ``level`` or worse."""
        if level is None:
            return False
        return value <= level if self.low_is_bad else value >= level

    @model_validator(mode="after")
    def _warns_before_it_stops(self) -> AlarmConfig:
        if self.warn is not None and self.stop is not None and self.reached(self.stop, self.warn):
            if self.warn == self.stop:
                return self
            side = "above" if self.low_is_bad else "below"
            raise ValueError(
                f"warn {self.warn:g} would come after stop {self.stop:g}. Set stop to a value that "
                f"is not {side} warn."
            )
        return self


class TruncationRateConfig(AlarmConfig):
    """Share of the student's completions that rollout.max_tokens cut."""

    warn: Warned = Field(0.98, ge=0)


class LengthGrowthConfig(AlarmConfig):
    """Mean length of the student's completions, relative to the first five steps of the phase."""

    warn: Warned = Field(4.0, ge=0)


class RepetitionConfig(AlarmConfig):
    """Share of 4-grams of the student's completions that occurred before in the same one."""

    warn: Warned = Field(0.5, ge=0)
    stop: Stopped = Field(0.95, ge=0)


class EntropyFractionConfig(AlarmConfig):
    """Student's entropy per token, relative to the first five steps of the phase. Low is bad."""

    low_is_bad: ClassVar[bool] = True
    warn: Warned = Field(0.1, ge=0)


class AlarmsConfig(BaseConfig):
    """Alarms that warn or stop the run. Faults that no healthy run has always stop it."""

    truncation_rate: TruncationRateConfig = TruncationRateConfig()
    length_growth: LengthGrowthConfig = LengthGrowthConfig()
    repetition: RepetitionConfig = RepetitionConfig()
    entropy_fraction: EntropyFractionConfig = EntropyFractionConfig()
    logprob_gap: float | None = Field(None, gt=0)
    """Largest mean difference in nats per token between a completion's log-probs by the engine that
    sampled it and by the same model where it is trained or scores. If unset: set by the
    precisions."""
    canary_every: int = Field(1, ge=0)
    """Number of steps between two scorings of the probe text; 0: none."""
    non_finite_steps: int = Field(3, ge=1)
    """Number of skipped steps in a row after which the run stops."""
