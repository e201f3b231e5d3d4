"""Configuration of the objectives.

There is one class per kind. It defines the options, the samplers that the objective can use, and
the per-token statistics that it reads. The function of the same name is in :mod:`seqkd.objectives`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from seqkd.config.base import BaseConfig, TeacherNeed
from seqkd.config.samplers import SamplerName, samplers_where

Unit = Literal["token", "sequence"]
"""Unit of a loss: nats per token, or nats per sequence."""


class _ObjectiveConfig(BaseConfig):
    label: ClassVar[str]
    """Name of the objective for reports."""
    samplers: ClassVar[tuple[SamplerName, ...]]
    """Samplers on whose completions the objective is defined."""

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments of the objective's function."""
        return self.model_dump(exclude={"kind"})

    def stats(self) -> tuple[str, ...]:
        """Return the names of the :class:`~seqkd.types.TokenStats` fields that the function
        reads."""
        raise NotImplementedError

    def end_stats(self) -> tuple[Literal["content_logprob", "graded_kl"], ...]:
        """Return the names of the :class:`~seqkd.types.EndStat` that the function reads."""
        return ()

    def divergence(self) -> tuple[str, float | None, float] | None:
        """Return the :class:`~seqkd.types.Divergence` that the function reads, if any."""
        return None

    @property
    def unit(self) -> Unit:
        """Unit of the function's value."""
        return "token"

    @property
    def running(self) -> bool:
        """True if the function reads the running estimates of :class:`~seqkd.types.Counts`."""
        return False

    @property
    def on_policy(self) -> bool:
        """True if the objective is an expectation under the student's own distribution."""
        return False

    @property
    def teacher_need(self) -> TeacherNeed:
        """Minimum that the teacher must provide."""
        names = set(self.stats())
        if names & {"reverse_kl", "forward_kl"} or self.divergence():
            return "distribution"
        return "logprobs" if "teacher_logprob" in names else "nothing"


class _PolicyGradientConfig(_ObjectiveConfig):
    """An objective on the student's samples, or on a mixture with importance weights to the
    student's distribution."""

    clip_ratio: float | None = Field(None, gt=0, lt=1)
    """PPO clip range e of the token ratio q / q_old, for samples of an older student: the ratio is
    clipped to [1 - e, 1 + e]. If unset: no clipping."""
    importance_ratio_cap: float | None = Field(None, ge=1)
    """Maximum of the token ratio q / q_old as an importance weight, for samples of an older
    student. If unset: no importance weights."""
    samplers: ClassVar = samplers_where(lambda s: s.on_student and (s.weighted or not s.on_teacher))

    @property
    def on_policy(self) -> bool:
        return True

    @model_validator(mode="after")
    def _one_correction(self) -> _PolicyGradientConfig:
        if self.clip_ratio is not None and self.importance_ratio_cap is not None:
            raise ValueError(
                f"clip_ratio is {self.clip_ratio:g} and importance_ratio_cap is "
                f"{self.importance_ratio_cap:g}, but only one correction for older samples can be "
                "used. Remove one of them."
            )
        return self


class SequenceReverseKLConfig(_PolicyGradientConfig):
    """KL(q || p) of whole sequences, minimized by policy gradient."""

    kind: Literal["sequence_reverse_kl"] = "sequence_reverse_kl"
    label: ClassVar = "sequence-level reverse KL"
    estimator: Literal["reinforce", "reward_to_go", "single_step", "rao_blackwell"] = (
        "rao_blackwell"
    )
    """Estimator of the cost of a token. reinforce: log-ratios of the whole sequence; reward_to_go:
    log-ratios of this and later tokens; single_step: the exact divergence at this token and
    log-ratios of later tokens; rao_blackwell: exact divergences at this and later tokens. All
    estimators have the same expectation."""
    baseline: Literal["none", "leave_one_out", "position_mean"] = "leave_one_out"
    """Baseline that is subtracted from the future cost. leave_one_out: mean over the other samples
    of the prompt at the same position; position_mean: mean over past batches at the same
    position."""
    normalization: Literal["rate", "total", "minillm", "neutral"] = "minillm"
    """Normalization of the loss. total: nats per sequence, exact, which favors short outputs; rate:
    nats per token, exact, which favors long outputs where late tokens are cheap; minillm: the
    future cost is divided by the number of remaining tokens, which is biased and favors short
    outputs; neutral: nats per token with fixed weights of the positions, so that an output is not
    favored for its length alone."""
    future_weight: float = Field(1.0, ge=0, le=1)
    """Weight of the future cost. 0: token level; 1: sequence level."""
    discount: float = Field(1.0, ge=0, le=1)
    """Discount factor of the future cost per token of distance."""
    stop: Literal["future", "graded"] = "future"
    """Cost of the decision to end the completion. future: the cost of later tokens, as for every
    token; graded: only its own divergence from the teacher's decision. Later tokens are then
    charged to the choice of the token alone. graded is biased. It requires estimator single_step
    or rao_blackwell, and teacher.scores hidden."""

    @model_validator(mode="after")
    def _options_fit_the_estimator(self) -> SequenceReverseKLConfig:
        if self.normalization == "minillm" and self.estimator in ("reinforce", "reward_to_go"):
            raise ValueError(
                f"normalization 'minillm' divides the future cost by the number of remaining "
                f"tokens, but estimator {self.estimator!r} does not compute it separately. Set "
                "estimator to single_step or rao_blackwell, or normalization to total, rate or "
                "neutral."
            )
        if self.normalization == "minillm" and self.baseline == "position_mean":
            raise ValueError(
                "baseline 'position_mean' is not available with normalization 'minillm': it "
                "estimates mean costs per position, not per number of remaining tokens. Set "
                "baseline to leave_one_out or none, or normalization to total or rate."
            )
        if self.normalization == "neutral" and self.baseline == "position_mean":
            raise ValueError(
                "baseline 'position_mean' is always 0 with normalization 'neutral', which "
                "subtracts from every cost the mean at its position. Set baseline to "
                "leave_one_out or none."
            )
        if self.stop == "graded" and self.estimator in ("reinforce", "reward_to_go"):
            raise ValueError(
                f"stop is 'graded', but estimator {self.estimator!r} does not compute the "
                "divergence of a token separately. Set estimator to single_step or rao_blackwell, "
                "or stop to future."
            )
        if self.estimator == "reinforce" and (self.future_weight != 1 or self.discount != 1):
            raise ValueError(
                f"future_weight is {self.future_weight:g} and discount is {self.discount:g}, but "
                "estimator 'reinforce' does not separate the future cost. Set estimator to "
                "reward_to_go, or future_weight and discount to 1."
            )
        return self

    @property
    def unit(self) -> Unit:
        return "sequence" if self.normalization in ("total", "minillm") else "token"

    @property
    def running(self) -> bool:
        return self.normalization in ("rate", "neutral") or self.baseline == "position_mean"

    def end_stats(self) -> tuple[Literal["content_logprob", "graded_kl"], ...]:
        return ("content_logprob", "graded_kl") if self.stop == "graded" else ()

    def stats(self) -> tuple[str, ...]:
        return {
            "reinforce": ("student_logprob", "teacher_logprob"),
            "reward_to_go": ("student_logprob", "teacher_logprob"),
            "single_step": ("student_logprob", "teacher_logprob", "reverse_kl"),
            "rao_blackwell": ("student_logprob", "reverse_kl"),
        }[self.estimator]


class SampledTokenConfig(_PolicyGradientConfig):
    """Token-level reverse KL, minimized by policy gradient with the sampled tokens only."""

    kind: Literal["sampled_token"] = "sampled_token"
    label: ClassVar = "token-level reverse KL by sampled tokens"

    def stats(self) -> tuple[str, ...]:
        return ("student_logprob", "teacher_logprob")


class SequenceForwardKLConfig(_ObjectiveConfig):
    """KL(p || q) of whole sequences on teacher samples: -log q(y), y ~ p."""

    kind: Literal["sequence_forward_kl"] = "sequence_forward_kl"
    label: ClassVar = "sequence-level forward KL"
    samplers: ClassVar = samplers_where(lambda s: not (s.on_student or s.from_data))

    @property
    def unit(self) -> Unit:
        return "sequence"

    def stats(self) -> tuple[str, ...]:
        return ("student_logprob",)


class SFTConfig(_ObjectiveConfig):
    """Mean over tokens of -log q(y_t): cross-entropy on text that the student did not write."""

    kind: Literal["sft"] = "sft"
    label: ClassVar = "supervised fine-tuning"
    samplers: ClassVar = samplers_where(lambda sampler: not sampler.on_student)

    def stats(self) -> tuple[str, ...]:
        return ("student_logprob",)


class _TokenLevelConfig(_ObjectiveConfig):
    """Mean over tokens of a divergence at each state. The completions may come from any sampler
    with prompts."""

    temperature: float = Field(1.0, gt=0)
    """Temperature of both distributions. The divergence is multiplied by its square."""
    samplers: ClassVar = samplers_where(lambda sampler: not sampler.plain_text)

    def options(self) -> dict[str, Any]:
        return {}

    def stats(self) -> tuple[str, ...]:
        return ()

    def coefficient(self) -> float | None:
        """Return the coefficient of the divergence, if it has one."""
        return None

    def divergence(self) -> tuple[str, float | None, float]:
        return (str(self.kind), self.coefficient(), self.temperature)  # type: ignore[attr-defined]


class TokenForwardKLConfig(_TokenLevelConfig):
    """KL(p || q) at each state."""

    kind: Literal["token_forward_kl"] = "token_forward_kl"
    label: ClassVar = "token-level forward KL"


class TokenReverseKLConfig(_TokenLevelConfig):
    """KL(q || p) at each state."""

    kind: Literal["token_reverse_kl"] = "token_reverse_kl"
    label: ClassVar = "token-level reverse KL"


class GJSDConfig(_TokenLevelConfig):
    """Generalized Jensen-Shannon divergence at each state."""

    kind: Literal["gjsd"] = "gjsd"
    label: ClassVar = "generalized Jensen-Shannon divergence"
    beta: float = Field(0.5, gt=0, lt=1)
    """Weight of the teacher in the mixture. Near 0 the divergence behaves like forward KL, near 1
    like reverse KL."""

    def coefficient(self) -> float:
        return self.beta


class _SkewConfig(_TokenLevelConfig):
    skew: float = Field(0.1, gt=0, lt=1)
    """Mixture weight lambda: the share of the first distribution in the mixture that it is compared
    with."""

    def coefficient(self) -> float:
        return self.skew


class SkewKLConfig(_SkewConfig):
    """KL(p || lambda p + (1 - lambda) q) at each state."""

    kind: Literal["skew_kl"] = "skew_kl"
    label: ClassVar = "skew KL"


class SkewReverseKLConfig(_SkewConfig):
    """KL(q || lambda q + (1 - lambda) p) at each state."""

    kind: Literal["skew_reverse_kl"] = "skew_reverse_kl"
    label: ClassVar = "skew reverse KL"


class TotalVariationConfig(_TokenLevelConfig):
    """Total variation distance at each state, which is half the L1 distance."""

    kind: Literal["total_variation"] = "total_variation"
    label: ClassVar = "total variation"


ObjectiveConfig = Annotated[
    SequenceReverseKLConfig
    | SequenceForwardKLConfig
    | SampledTokenConfig
    | SFTConfig
    | TokenForwardKLConfig
    | TokenReverseKLConfig
    | GJSDConfig
    | SkewKLConfig
    | SkewReverseKLConfig
    | TotalVariationConfig,
    Field(discriminator="kind"),
]
