"""The configuration of the models and of the actors that hold them."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from seqkd.config.base import BaseConfig, Precision
from seqkd.config.resources import ActorsConfig, EngineConfig


class _LocalTeacherConfig(ActorsConfig):
    model: str = Field(description="A local directory or a hub name, in transformers' format.")
    scores: Literal["hidden", "top_k", "logprobs"] = Field(
        "hidden",
        description="hidden: the whole distribution; top_k: the most probable tokens and the rest "
        "as one event; logprobs: sampled tokens only.",
    )
    top_k: int = Field(64, ge=1, description="Tokens that scores=top_k names at each state.")
    batch_tokens: int = Field(8192, ge=1, description="Tokens scored in one engine step.")
    allow_template_mismatch: bool = Field(
        False, description="Go on with a chat template that is not the student's."
    )
    generation: EngineConfig = Field(
        EngineConfig(),
        description="The vLLM engine with which the teacher writes completions; what is left out "
        "is as for scoring.",
    )

    @property
    def distribution(self) -> bool:
        """Whether its scores tell its distribution."""
        return self.scores != "logprobs"

    def at_once(self, length: int) -> int:
        """How many sequences of ``length`` tokens keep all of it busy."""
        return -(-self.batch_tokens * self.actors // length)

    @model_validator(mode="before")
    @classmethod
    def _generation_inherits(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("generation") or {}, dict):
            return data
        both = cls.model_fields.keys() & EngineConfig.model_fields.keys()
        inherited = {key: value for key, value in data.items() if key in both}
        return {**data, "generation": inherited | (data.get("generation") or {})}


class VllmTeacherConfig(_LocalTeacherConfig, EngineConfig):
    """A teacher that scores by vLLM's pooling runner."""

    kind: Literal["vllm"] = "vllm"


class HfTeacherConfig(_LocalTeacherConfig):
    """A teacher that scores by a transformers forward pass."""

    kind: Literal["hf"] = "hf"
    precision: Precision = Field("float32", description="Of the model's weights.")
    batch_tokens: int = Field(4096, ge=1, description="Padded tokens of one forward pass.")


class EndpointTeacherConfig(BaseConfig):
    """A teacher behind an OpenAI-compatible endpoint. Without scores it writes, and its text is
    tokenized anew for the student, so that the two tokenizers may differ. With scores it must have
    the student's."""

    kind: Literal["openai"] = "openai"
    model: str = Field(description="The name under which the endpoint serves it.")
    base_url: str = Field(pattern=r"^https?://", description="Up to and including /v1.")
    api: Literal["chat", "completions"] = Field(
        "chat", description="chat: the endpoint's own template; completions: the student's."
    )
    api_key_env: str = Field(
        "OPENAI_API_KEY", description="Environment variable that holds the key."
    )
    concurrency: int = Field(8, ge=1, description="Requests under way at once.")
    timeout_s: float = Field(120.0, gt=0, description="Of one request.")
    max_retries: int = Field(
        10, ge=0, description="Of one request, with growing pauses, before the run fails."
    )
    scores: Literal["none", "logprobs", "top_k"] = Field(
        "none",
        description="logprobs: sampled tokens only; top_k: the most probable tokens and the rest "
        "as one event; by the completions interface, with echo, on token ids.",
    )
    top_k: int = Field(
        20, ge=1, description="Tokens that scores=top_k names at each state; servers have a limit."
    )
    tokenizer: str | None = Field(
        None, description="Directory or hub name of the served model's tokenizer, for scores."
    )
    checkpoint: str | None = Field(
        None, description="What the endpoint should serve, where it is here, to compare with."
    )
    precision: Precision = Field(
        "bfloat16", description="What the endpoint computes in: how closely its scores must repeat."
    )

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
    def distribution(self) -> bool:
        """Whether its scores tell its distribution."""
        return self.scores == "top_k"

    def at_once(self, length: int) -> int:
        """How many sequences keep all of it busy, whatever their length."""
        return self.concurrency

    @property
    def generation(self) -> ActorsConfig:
        """The process that makes the requests."""
        return ActorsConfig()


SingleTeacherConfig = VllmTeacherConfig | HfTeacherConfig | EndpointTeacherConfig


class MemberConfig(BaseConfig):
    """One of several teachers."""

    teacher: Annotated[SingleTeacherConfig, Field(discriminator="kind")] = Field(
        description="Of kind vllm, hf or openai."
    )
    weight: float = Field(1.0, gt=0, description="Its share of the prompts that it may have.")
    tags: tuple[str, ...] = Field((), description="Rows that it may have (data.tag_key); all.")


class MultiTeacherConfig(BaseConfig):
    """Each prompt has one of them, by its tag, and among those that may have it by their weights.

    With weights w the expected loss is the weighted sum of the losses to each: for forward KL up to
    a constant that to their mixture, for reverse KL that to their normalised geometric mean.
    """

    kind: Literal["multi"] = "multi"
    teachers: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")], MemberConfig] = Field(
        min_length=1, description="By a name of your choice."
    )

    @model_validator(mode="after")
    def _same_scores(self) -> MultiTeacherConfig:
        forms = {name: member.teacher.scores for name, member in self.teachers.items()}
        if len(set(forms.values())) > 1:
            raise ValueError(
                f"teachers give scores of different kinds ({forms}), and one loss is made of all. "
                "Set teacher.scores of each to the same."
            )
        return self

    @property
    def scores(self) -> str:
        """What each of them gives."""
        return next(iter(self.teachers.values())).teacher.scores

    @property
    def distribution(self) -> bool:
        """Whether their scores tell their distributions."""
        return all(member.teacher.distribution for member in self.teachers.values())

    def candidates(self, tag: str) -> dict[str, float]:
        """Names and weights of those that may have a prompt with ``tag``."""
        return {n: m.weight for n, m in self.teachers.items() if not m.tags or tag in m.tags}

    def choose(self, tag: str, prompt_id: str) -> str:
        """Name of a prompt's teacher: the same for the same prompt, always."""
        weights = self.candidates(tag)
        digest = hashlib.blake2b(prompt_id.encode(), digest_size=8).digest()
        left = int.from_bytes(digest, "big") / 2**64 * sum(weights.values())
        *others, last = weights
        for name in others:
            if left < weights[name]:
                return name
            left -= weights[name]
        return last


TeacherConfig = Annotated[
    VllmTeacherConfig | HfTeacherConfig | EndpointTeacherConfig | MultiTeacherConfig,
    Field(discriminator="kind", description="What is learnt from."),
]
