"""Configuration of the teachers: one class per kind, and several teachers at once."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from seqkd.config.base import BaseConfig, Precision
from seqkd.config.resources import ActorsConfig, EngineConfig


class SingleTeacherConfig(BaseConfig):
    """Interface of a teacher's configuration. Every kind overrides the properties in which it
    differs."""

    if TYPE_CHECKING:  # every kind has these keys, with its own types and defaults
        kind: str
        model: str
        scores: str
        top_k: int
        precision: Precision

    @property
    def local(self) -> LocalTeacherConfig | None:
        """This configuration if the run loads the teacher's checkpoint, otherwise None."""
        return None

    @property
    def endpoint(self) -> EndpointTeacherConfig | None:
        """This configuration if the teacher is behind a network endpoint, otherwise None."""
        return None

    @property
    def distribution(self) -> bool:
        """True if the scores contain the teacher's distribution or its most probable tokens."""
        return self.scores not in ("none", "logprobs")

    @property
    def by_text(self) -> bool:
        """True if completions are returned as text, so that token probabilities are unknown."""
        return False

    @property
    def scoring(self) -> ActorsConfig:
        """Actors that score."""
        return ActorsConfig()

    @property
    def writing(self) -> ActorsConfig:
        """Actors that write completions."""
        return ActorsConfig()

    @property
    def writing_precision(self) -> Precision | None:
        """Precision of the engine that writes completions. None if it is unknown."""
        return None

    @property
    def distribution_hint(self) -> str:
        """Advice on how to get the teacher's distribution, appended to an error message."""
        return "Use a local teacher (kind vllm or hf)."

    def at_once(self, length: int) -> int:
        """Return the number of sequences of ``length`` tokens that keep all scoring actors busy."""
        return 1

    def describe(self) -> dict[str, str]:
        """Return the settings that identify this teacher."""
        return {"model": self.model, "precision": self.precision}

    @property
    def named(self) -> dict[str, SingleTeacherConfig]:
        """Teachers by name. A single teacher has an empty name."""
        return {"": self}

    @property
    def tagged(self) -> bool:
        """True if the choice of a prompt's teacher depends on the prompt's tag."""
        return False

    def candidates(self, tag: str) -> dict[str, float]:
        """Return names and weights of the teachers that may be chosen for a prompt with ``tag``."""
        return {"": 1.0}

    def choose(self, tag: str, prompt_id: str) -> str:
        """Return the name of a prompt's teacher. It depends only on the two arguments."""
        return ""

    def replaced(self, teachers: Mapping[str, SingleTeacherConfig]) -> Any:
        """Return the configuration with other teachers under the same names."""
        return teachers[""]


class LocalTeacherConfig(SingleTeacherConfig, ActorsConfig):
    """A teacher whose checkpoint is loaded by the run."""

    model: str
    """Local directory or hub name of the model, in transformers' format."""
    scores: Literal["hidden", "top_k", "logprobs"] = "hidden"
    """Content of the teacher's scores. hidden: hidden states, from which the learner computes the
    full distribution; top_k: log-probs of the most probable tokens, with all other tokens as one
    event; logprobs: log-probs of the completion tokens only."""
    top_k: int = Field(64, ge=1)
    """Number of tokens per state with scores=top_k."""
    batch_tokens: int = Field(8192, ge=1)
    """Maximum number of tokens that are scored in one engine step."""
    allow_template_mismatch: bool = False
    """Warning instead of an error if the teacher's chat template differs from the student's."""
    generation: EngineConfig = EngineConfig()
    """vLLM engine with which the teacher writes completions. Unset keys are the same as for
    scoring."""
    precision: Precision = "float32"
    """Precision of the model's weights."""

    @property
    def local(self) -> LocalTeacherConfig:
        return self

    @property
    def scoring(self) -> ActorsConfig:
        return self

    @property
    def engine(self) -> EngineConfig | None:
        """Settings of the vLLM engine that scores, or None if no engine scores."""
        return None

    @property
    def writing(self) -> EngineConfig:
        return self.generation

    @property
    def writing_precision(self) -> Precision:
        return self.generation.precision

    @property
    def distribution_hint(self) -> str:
        return "Set teacher.scores to hidden or top_k."

    def at_once(self, length: int) -> int:
        return -(-self.batch_tokens * self.actors // length)

    @model_validator(mode="before")
    @classmethod
    def _generation_inherits(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("generation") or {}, dict):
            return data
        both = cls.model_fields.keys() & EngineConfig.model_fields.keys()
        inherited = {key: value for key, value in data.items() if key in both}
        return {**data, "generation": inherited | (data.get("generation") or {})}


class VllmTeacherConfig(LocalTeacherConfig, EngineConfig):
    """A teacher that scores with vLLM's pooling runner."""

    kind: Literal["vllm"] = "vllm"

    @property
    def engine(self) -> EngineConfig:
        return self


class HfTeacherConfig(LocalTeacherConfig):
    """A teacher that scores with a transformers forward pass."""

    kind: Literal["hf"] = "hf"
    batch_tokens: int = Field(4096, ge=1)
    """Maximum number of tokens in one forward pass, including padding."""


class EndpointTeacherConfig(SingleTeacherConfig):
    """A teacher behind an OpenAI-compatible endpoint. Without scores, the teacher writes
    completions as text, which is tokenized for the student, so the two tokenizers may differ. With
    scores, the teacher must have the student's tokenizer."""

    kind: Literal["openai"] = "openai"
    model: str
    """Name under which the endpoint serves the model."""
    base_url: str = Field(pattern=r"^https?://")
    """URL of the endpoint, up to and including /v1."""
    api: Literal["chat", "completions"] = "chat"
    """API with which completions are requested. chat: the endpoint applies its own chat template;
    completions: prompts are rendered with the student's chat template."""
    api_key_env: str = "OPENAI_API_KEY"
    """Name of the environment variable with the API key."""
    concurrency: int = Field(8, ge=1)
    """Maximum number of concurrent requests."""
    timeout_s: float = Field(120.0, gt=0)
    """Seconds after which a request, including its response, is retried."""
    max_retries: int = Field(10, ge=0)
    """Maximum number of retries of a request that fails (rate limits, server errors, lost
    connections, timeouts), with increasing delays, before the run fails."""
    answer_retries: int = Field(3, ge=0)
    """Maximum number of retries after an invalid or refused response, such as one stopped by a
    content filter."""
    on_refusal: Literal["skip", "fail"] = "skip"
    """Action when all responses to a request are invalid or refused. skip: drop the completion from
    training and evaluation; fail: the run fails."""
    max_skipped_share: float = Field(0.1, ge=0, le=1)
    """Largest share of a process's completions or scores that may be skipped before the run fails,
    after the first 20."""
    scores: Literal["none", "logprobs", "top_k"] = "none"
    """Content of the teacher's scores. none: no scores, the teacher only writes completions;
    logprobs: log-probs of the completion tokens only; top_k: log-probs of the most probable tokens,
    with all other tokens as one event. logprobs and top_k use the completions API with echo, on
    token ids."""
    top_k: int = Field(20, ge=1)
    """Number of tokens per state with scores=top_k. Servers limit it."""
    tokenizer: str | None = None
    """Local directory or hub name of the served model's tokenizer. Required for scores."""
    checkpoint: str | None = None
    """Local directory or hub name of the model that the endpoint should serve. If set: its
    log-probs are compared with the endpoint's."""
    precision: Precision = "bfloat16"
    """Precision of the served model. It determines how closely repeated scores must agree."""

    @field_validator("api_key_env")
    @classmethod
    def _a_name(cls, value: str) -> str:
        if not value.isidentifier():  # the value is not shown because it may be the key itself
            raise ValueError(
                "is not the name of an environment variable. Set it to the name of the variable "
                "that contains the key."
            )
        return value

    @model_validator(mode="after")
    def _scores_fit(self) -> EndpointTeacherConfig:
        if self.scores != "none" and self.tokenizer is None:
            raise ValueError(
                f"scores is {self.scores!r}, which requires a served model with the student's "
                "tokenizer, but teacher.tokenizer is not set. Set it to the directory or hub name "
                "of the served model's tokenizer, or set scores to none."
            )
        if self.scores == "none" and self.checkpoint is not None:
            raise ValueError(
                f"checkpoint is {self.checkpoint!r}, to compare its log-probs with the endpoint's, "
                "but scores is 'none'. Set scores to logprobs or top_k, or remove checkpoint."
            )
        return self

    @property
    def endpoint(self) -> EndpointTeacherConfig:
        return self

    @property
    def by_text(self) -> bool:
        return self.api == "chat" or self.scores == "none"

    @property
    def distribution_hint(self) -> str:
        return (
            "Set it to top_k if the endpoint returns log-probs and has the student's tokenizer. "
            "Otherwise set sampler to teacher, or use a local teacher (kind vllm or hf)."
        )

    def at_once(self, length: int) -> int:
        return self.concurrency

    def describe(self) -> dict[str, str]:
        return {"model": self.model, "base_url": self.base_url, "api": self.api}


TeacherKind = VllmTeacherConfig | HfTeacherConfig | EndpointTeacherConfig


class WeightedTeacherConfig(BaseConfig):
    """One of several teachers."""

    teacher: Annotated[TeacherKind, Field(discriminator="kind")]
    """Teacher of kind vllm, hf or openai."""
    weight: float = Field(1.0, gt=0)
    """Relative probability of this teacher among the teachers that a prompt's tag allows."""
    tags: tuple[str, ...] = ()
    """Tags (data.tag_key) of the prompts for which this teacher may be chosen. Empty: all
    prompts."""


class MultiTeacherConfig(BaseConfig):
    """Several teachers. Every prompt is assigned one of the teachers that its tag allows, by a hash
    of the prompt and with probability proportional to the teacher's weight.

    The expected loss is the weighted sum of the losses to the teachers. Up to a constant it equals,
    for forward KL, the loss to the mixture of the teachers, and for reverse KL, the loss to their
    normalized geometric mean.
    """

    kind: Literal["multi"] = "multi"
    teachers: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")], WeightedTeacherConfig] = (
        Field(min_length=1)
    )
    """Teachers by name, which may be chosen freely."""

    @model_validator(mode="after")
    def _same_scores(self) -> MultiTeacherConfig:
        forms = {name: share.teacher.scores for name, share in self.teachers.items()}
        if len(set(forms.values())) > 1:
            raise ValueError(
                f"teachers have different values of scores ({forms}), but one loss cannot combine "
                "them. Set scores to the same value for all teachers."
            )
        return self

    @property
    def scores(self) -> str:
        """Content of the scores, the same for all teachers."""
        return next(iter(self.teachers.values())).teacher.scores

    @property
    def distribution(self) -> bool:
        """True if the scores contain the teachers' distributions."""
        return all(share.teacher.distribution for share in self.teachers.values())

    @property
    def named(self) -> dict[str, SingleTeacherConfig]:
        """See :class:`SingleTeacherConfig`."""
        return {name: share.teacher for name, share in self.teachers.items()}

    @property
    def tagged(self) -> bool:
        """See :class:`SingleTeacherConfig`."""
        return any(share.tags for share in self.teachers.values())

    def candidates(self, tag: str) -> dict[str, float]:
        """See :class:`SingleTeacherConfig`."""
        return {
            name: share.weight
            for name, share in self.teachers.items()
            if not share.tags or tag in share.tags
        }

    def choose(self, tag: str, prompt_id: str) -> str:
        """See :class:`SingleTeacherConfig`."""
        weights = self.candidates(tag)
        digest = hashlib.blake2b(prompt_id.encode(), digest_size=8).digest()
        left = int.from_bytes(digest, "big") / 2**64 * sum(weights.values())
        *others, last = weights
        for name in others:
            if left < weights[name]:
                return name
            left -= weights[name]
        return last

    def replaced(self, teachers: Mapping[str, SingleTeacherConfig]) -> MultiTeacherConfig:
        """See :class:`SingleTeacherConfig`."""
        shares = {
            name: share.model_copy(update={"teacher": teachers[name]})
            for name, share in self.teachers.items()
        }
        return self.model_copy(update={"teachers": shares})


TeacherConfig = Annotated[
    TeacherKind | MultiTeacherConfig,
    Field(discriminator="kind", description="Model or models that the student learns from."),
]
