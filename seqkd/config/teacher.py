"""Configuration of the teachers: one class for each kind, and several teachers at once."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from seqkd.config.base import BaseConfig, Precision
from seqkd.config.resources import ActorsConfig, EngineConfig


class SingleTeacherConfig(BaseConfig):
    """Everything that a run asks of a teacher's configuration. A kind overrides what differs."""

    if TYPE_CHECKING:  # every kind has these keys, with its own types and defaults
        kind: str
        model: str
        scores: str
        top_k: int
        precision: Precision

    @property
    def local(self) -> LocalTeacherConfig | None:
        """This configuration, if the run itself loads the teacher's checkpoint."""
        return None

    @property
    def endpoint(self) -> EndpointTeacherConfig | None:
        """This configuration, if the teacher is behind a network endpoint."""
        return None

    @property
    def distribution(self) -> bool:
        """True if the scores hold the teacher's distribution, or the most probable part of it."""
        return self.scores not in ("none", "logprobs")

    @property
    def by_text(self) -> bool:
        """True if completions come as text, whose tokens' probabilities are unknown."""
        return False

    @property
    def scoring(self) -> ActorsConfig:
        """Processes that score."""
        return ActorsConfig()

    @property
    def writing(self) -> ActorsConfig:
        """Processes that write completions."""
        return ActorsConfig()

    @property
    def writing_precision(self) -> Precision | None:
        """Precision of the engine that writes completions, or None if it is unknown."""
        return None

    @property
    def distribution_hint(self) -> str:
        """Advice on how to get the teacher's distribution, as the end of an error message."""
        return "Use a local teacher (kind vllm or hf)."

    def at_once(self, length: int) -> int:
        """Return how many sequences of ``length`` tokens keep the scoring processes busy."""
        return 1

    def describe(self) -> dict[str, str]:
        """Return what distinguishes this teacher from others, which is part of its identity."""
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
        """Return names and weights of the teachers that may have a prompt with ``tag``."""
        return {"": 1.0}

    def choose(self, tag: str, prompt_id: str) -> str:
        """Return the name of a prompt's teacher. It depends on nothing but the two arguments."""
        return ""

    def replaced(self, teachers: Mapping[str, SingleTeacherConfig]) -> Any:
        """Return the configuration with other teachers under the same names."""
        return teachers[""]


class LocalTeacherConfig(SingleTeacherConfig, ActorsConfig):
    """A teacher whose checkpoint the run loads."""

    model: str
    """Local directory or hub name of the model, in transformers' format."""
    scores: Literal["hidden", "top_k", "logprobs"] = "hidden"
    """Kind of the scores. hidden: hidden states, which give the whole distribution; top_k: the most
    probable tokens, with the rest as one event; logprobs: the sampled tokens only."""
    top_k: int = Field(64, ge=1)
    """Number of tokens per state under scores=top_k."""
    batch_tokens: int = Field(8192, ge=1)
    """Number of tokens that are scored in one engine step."""
    allow_template_mismatch: bool = False
    """Permission to continue, with a warning, if the teacher's chat template is not the
    student's."""
    generation: EngineConfig = EngineConfig()
    """vLLM engine with which the teacher writes completions. Keys that are unset are as for
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
    """A teacher that scores by vLLM's pooling runner."""

    kind: Literal["vllm"] = "vllm"

    @property
    def engine(self) -> EngineConfig:
        return self


class HfTeacherConfig(LocalTeacherConfig):
    """A teacher that scores by a transformers forward pass."""

    kind: Literal["hf"] = "hf"
    batch_tokens: int = Field(4096, ge=1)
    """Number of tokens in one forward pass, padding included."""


class EndpointTeacherConfig(SingleTeacherConfig):
    """A teacher behind an OpenAI-compatible endpoint. Without scores it writes completions, whose
    text is tokenized again for the student, so that the two tokenizers may differ. With scores its
    tokenizer must be the student's."""

    kind: Literal["openai"] = "openai"
    model: str
    """Name under which the endpoint serves the model."""
    base_url: str = Field(pattern=r"^https?://")
    """URL of the endpoint, up to and including /v1."""
    api: Literal["chat", "completions"] = "chat"
    """Interface of the endpoint. chat: with the endpoint's own template; completions: with the
    student's."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key."""
    concurrency: int = Field(8, ge=1)
    """Largest number of concurrent requests."""
    timeout_s: float = Field(120.0, gt=0)
    """Seconds after which a request is repeated."""
    max_retries: int = Field(10, ge=0)
    """Number of times that a request is repeated, with growing pauses, before the run fails."""
    scores: Literal["none", "logprobs", "top_k"] = "none"
    """Kind of the scores. logprobs: the sampled tokens only; top_k: the most probable tokens, with
    the rest as one event. Both use the completions interface with echo, on token ids."""
    top_k: int = Field(20, ge=1)
    """Number of tokens per state under scores=top_k. Servers limit it."""
    tokenizer: str | None = None
    """Local directory or hub name of the served model's tokenizer, required for scores."""
    checkpoint: str | None = None
    """Local directory or hub name of the model that should be served, to compare its log-probs
    with the endpoint's."""
    precision: Precision = "bfloat16"
    """Precision in which the endpoint computes. It sets how closely scores must repeat."""

    @field_validator("api_key_env")
    @classmethod
    def _a_name(cls, value: str) -> str:
        if not value.isidentifier():  # its text is not shown: it may be the key itself
            raise ValueError(
                "is not the name of an environment variable. Name the one with the key."
            )
        return value

    @model_validator(mode="after")
    def _scores_fit(self) -> EndpointTeacherConfig:
        if self.scores != "none" and self.tokenizer is None:
            raise ValueError(
                f"scores {self.scores!r} are of the student's tokens, so the served model must "
                "have the student's tokenizer, but teacher.tokenizer is not set. Set it to the "
                "directory or hub name of the served model's, or scores to none."
            )
        if self.scores == "none" and self.checkpoint is not None:
            raise ValueError(
                f"checkpoint {self.checkpoint!r} is compared by log-probs, but scores is 'none'. "
                "Set scores to logprobs or top_k, or leave checkpoint out."
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
            "Set it to top_k, where the endpoint gives log-probs and has the student's "
            "tokenizer. Else set sampler to teacher, or use a local teacher (kind vllm or hf)."
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
    """Share of the teacher in the prompts that it may have."""
    tags: tuple[str, ...] = ()
    """Tags of the rows that the teacher may have (data.tag_key). Empty: all rows."""


class MultiTeacherConfig(BaseConfig):
    """Several teachers. Each prompt has one of them, by its tag, and by the weights of those that
    the tag allows.

    With weights w the expected loss is the weighted sum of the losses to each: for forward KL up to
    a constant that to their mixture, for reverse KL that to their normalized geometric mean.
    """

    kind: Literal["multi"] = "multi"
    teachers: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")], WeightedTeacherConfig] = (
        Field(min_length=1)
    )
    """Teachers by a name of your choice."""

    @model_validator(mode="after")
    def _same_scores(self) -> MultiTeacherConfig:
        forms = {name: share.teacher.scores for name, share in self.teachers.items()}
        if len(set(forms.values())) > 1:
            raise ValueError(
                f"teachers give scores of different kinds ({forms}), and one loss is made of all. "
                "Set teacher.scores of each to the same."
            )
        return self

    @property
    def scores(self) -> str:
        """Kind of the scores of every teacher."""
        return next(iter(self.teachers.values())).teacher.scores

    @property
    def distribution(self) -> bool:
        """True if the scores hold the teachers' distributions."""
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
