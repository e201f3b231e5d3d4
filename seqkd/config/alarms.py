"""Configuration of the alarms."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from seqkd.config.base import BaseConfig

Warned = Annotated[float | None, Field(description="Threshold for a warning. null: no warning.")]
Stopped = Annotated[float | None, Field(description="Threshold for a stop. null: no stop.")]


class AlarmConfig(BaseConfig):
    """Thresholds of a metric for a warning and for a stop of the run. The mean of the metric over
    the last five steps is compared with them."""

    low_is_bad: ClassVar[bool] = False
    warn: Warned
    stop: Stopped = Field(None, ge=0)

    def reached(self, level: float | None, value: float) -> bool:
        """Return True if ``value`` is as bad as ``level`` or worse."""
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
                f"stop is {self.stop:g}, which is reached before warn {self.warn:g}. Set stop to a "
                f"value that is not {side} warn."
            )
        return self


class TruncationRateConfig(AlarmConfig):
    """Share of the student's completions that are truncated at rollout.max_tokens."""

    warn: Warned = Field(0.98, ge=0)


class LengthGrowthConfig(AlarmConfig):
    """Mean length of the student's completions, relative to the first five steps of the phase. High
    values are bad."""

    warn: Warned = Field(4.0, ge=0)


class RepetitionConfig(AlarmConfig):
    """Share of 4-grams in the student's completions that already occurred in the same
    completion."""

    warn: Warned = Field(0.5, ge=0)
    stop: Stopped = Field(0.95, ge=0)


class EntropyFractionConfig(AlarmConfig):
    """The student's entropy per token, relative to the first five steps of the phase. Low values
    are bad."""

    low_is_bad: ClassVar[bool] = True
    warn: Warned = Field(0.1, ge=0)


class AlarmsConfig(BaseConfig):
    """Health checks that warn or stop the run. Thresholds apply to the mean over the last five
    steps. Faults that never occur in a healthy run always stop it."""

    truncation_rate: TruncationRateConfig = TruncationRateConfig()
    length_growth: LengthGrowthConfig = LengthGrowthConfig()
    repetition: RepetitionConfig = RepetitionConfig()
    entropy_fraction: EntropyFractionConfig = EntropyFractionConfig()
    logprob_gap: float | None = Field(None, gt=0)
    """Largest allowed mean difference, in nats per token, between two log-probs of a completion:
    those of the engine that sampled it, and those of the same model in the learner or in the
    scoring teacher. If unset: determined by the precisions."""
    canary_every: int = Field(1, ge=0)
    """Number of steps between checks with the probe text. 0: no checks."""
    non_finite_steps: int = Field(3, ge=1)
    """Number of consecutive non-finite (skipped) steps after which the run stops."""
