"""The configuration of the models and of the actors that hold them."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from seqkd.config_schema import Precision, Schema


class Checkpoint(Schema):
    """Start from the model as it is."""

    kind: Literal["checkpoint"] = "checkpoint"


class Prune(Schema):
    """Start from the model without layers [first, last): depth pruning."""

    kind: Literal["prune"] = "prune"
    drop_layers: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=1)]] = Field(
        description="[first, last): the layers that are left out, counted from 0; last stays."
    )

    @field_validator("drop_layers")
    @classmethod
    def _a_range(cls, value: tuple[int, int]) -> tuple[int, int]:
        if value[0] >= value[1]:
            raise ValueError("drop_layers is [first, last) and first must be below last.")
        return value


class Lora(Schema):
    """Low-rank adapters, which learn in place of the model's own weights (docs/lora.md)."""

    rank: int = Field(16, ge=1, description="Rows of A and columns of B, which the adapters learn.")
    alpha: int = Field(32, ge=1, description="What the adapters add is scaled by alpha / rank.")
    targets: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear",
        description="Linear layers by the last part of their name, such as q_proj; all-linear: "
        "every one but the output head.",
    )

    @field_validator("targets", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        named = isinstance(value, list | tuple) and value and all(isinstance(n, str) for n in value)
        if value != "all-linear" and not named:
            raise ValueError(
                f"{value!r:.80} is neither all-linear nor a list of names. Set it to all-linear, "
                "or name linear layers of the student, as in [q_proj, v_proj]."
            )
        return value


class Student(Schema):
    """The model that learns."""

    model: str = Field(description="A local directory or a hub name, in transformers' format.")
    init: Annotated[Checkpoint | Prune, Field(discriminator="kind")] = Field(
        Checkpoint(), description="What it begins as."
    )
    lora: Lora | None = Field(None, description="Left out: every weight of the model learns.")


class Actors(Schema):
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


class Engine(Actors):
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
    def _gpus_cover_tensor_parallel(self) -> Engine:
        if self.tensor_parallel_size > 1 and self.gpus != self.tensor_parallel_size:
            raise ValueError(
                f"gpus {self.gpus:g} does not equal tensor_parallel_size "
                f"{self.tensor_parallel_size}. Set gpus to the same number."
            )
        return self


class _Teacher(Actors):
    model: str = Field(description="A local directory or a hub name, in transformers' format.")
    scores: Literal["hidden", "top_k", "logprobs"] = Field(
        "hidden",
        description="hidden: the whole distribution; top_k: the most probable tokens and the rest "
        "as one event; logprobs: sampled tokens only.",
    )
    top_k: int = Field(64, ge=1, description="Tokens that scores=top_k names at each state.")
    batch_tokens: int = Field(8192, ge=1, description="Tokens scored in one engine step.")
    other_template: bool = Field(
        False, description="Go on with a chat template that is not the student's."
    )
    generation: Engine = Field(
        Engine(),
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
        both = cls.model_fields.keys() & Engine.model_fields.keys()
        inherited = {key: value for key, value in data.items() if key in both}
        return {**data, "generation": inherited | (data.get("generation") or {})}


class VllmTeacher(_Teacher, Engine):
    """A teacher that scores by vLLM's pooling runner."""

    kind: Literal["vllm"] = "vllm"


class HfTeacher(_Teacher):
    """A teacher that scores by a transformers forward pass."""

    kind: Literal["hf"] = "hf"
    precision: Precision = Field("float32", description="Of the model's weights.")
    batch_tokens: int = Field(4096, ge=1, description="Padded tokens of one forward pass.")


class ApiTeacher(Schema):
    """A teacher behind an OpenAI-compatible endpoint. Without scores it writes, and its text is
    tokenized anew for the student, so that the two tokenizers may differ. With scores it must have
    the student's."""

    kind: Literal["openai"] = "openai"
    model: str = Field(description="The name under which the endpoint serves it.")
    base_url: str = Field(pattern=r"^https?://", description="Up to and including /v1.")
    api: Literal["chat", "completions"] = Field(
        "chat", description="chat: the endpoint's own template; completions: the student's."
    )
    key_env: str = Field("OPENAI_API_KEY", description="Environment variable that holds the key.")
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

    @field_validator("key_env")
    @classmethod
    def _a_name(cls, value: str) -> str:
        if not value.isidentifier():  # its text is not shown: it may be the key itself
            raise ValueError(
                "is not the name of an environment variable. Name the one with the key."
            )
        return value

    @model_validator(mode="after")
    def _scores_fit(self) -> ApiTeacher:
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
    def generation(self) -> Actors:
        """The process that makes the requests."""
        return Actors()


OneTeacher = VllmTeacher | HfTeacher | ApiTeacher


class Member(Schema):
    """One of several teachers."""

    teacher: Annotated[OneTeacher, Field(discriminator="kind")] = Field(
        description="Of kind vllm, hf or openai."
    )
    weight: float = Field(1.0, gt=0, description="Its share of the prompts that it may have.")
    tags: tuple[str, ...] = Field((), description="Rows that it may have (data.tag_key); all.")


class SeveralTeachers(Schema):
    """Each prompt has one of them, by its tag, and among those that may have it by their weights.

    With weights w the expected loss is the weighted sum of the losses to each: for forward KL up to
    a constant that to their mixture, for reverse KL that to their normalised geometric mean.
    """

    kind: Literal["several"] = "several"
    members: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")], Member] = Field(
        min_length=1, description="By a name of your choice."
    )

    @model_validator(mode="after")
    def _same_scores(self) -> SeveralTeachers:
        forms = {name: member.teacher.scores for name, member in self.members.items()}
        if len(set(forms.values())) > 1:
            raise ValueError(
                f"members give scores of different kinds ({forms}), and one loss is made of all. "
                "Set teacher.scores of each to the same."
            )
        return self

    @property
    def scores(self) -> str:
        """What each of them gives."""
        return next(iter(self.members.values())).teacher.scores

    @property
    def distribution(self) -> bool:
        """Whether their scores tell their distributions."""
        return all(member.teacher.distribution for member in self.members.values())

    def candidates(self, tag: str) -> dict[str, float]:
        """Names and weights of those that may have a prompt with ``tag``."""
        return {n: m.weight for n, m in self.members.items() if not m.tags or tag in m.tags}

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


Teacher = Annotated[
    VllmTeacher | HfTeacher | ApiTeacher | SeveralTeachers,
    Field(discriminator="kind", description="What is learnt from."),
]


class Rollout(Engine):
    """Sampling, by the student or by the teacher."""

    samples_per_prompt: int = Field(4, ge=1, description="Completions of a prompt in one step.")
    max_tokens: int = Field(64, ge=1, description="Longest completion, data set answers too.")
    mask_truncated: bool = Field(
        False,
        description="Leave sampled completions that max_tokens cut out of the loss (a bias against "
        "long ones); a step of which all are cut learns from all.",
    )
    max_staleness: int = Field(
        0,
        ge=0,
        le=1,
        description="How many draws the student that samples may be behind the one that learns. 1: "
        "with placement split the next draw is sampled and scored while the learner is at work.",
    )
    temperature: float = Field(
        1.0, gt=0, description="Of sampling. Objectives that are expectations under q want 1."
    )
    top_p: float = Field(
        1.0, gt=0, le=1, description="Probability mass that is sampled from; likewise."
    )
    teacher_fraction: float = Field(
        0.2, gt=0, lt=1, description="Share of teacher samples under sampler=mixture."
    )


class Learner(Schema):
    """The DeepSpeed ranks and the optimizer."""

    ranks: int = Field(1, ge=1, description="DeepSpeed ranks, a process each.")
    cpus: int = Field(1, ge=1, description="Threads of each rank.")
    gpus: float = Field(0.0, ge=0, le=1, description="GPUs of each rank.")
    zero_stage: Literal[0, 1, 2, 3] = Field(
        2,
        description="What ZeRO splits over the ranks. 1: optimizer state; 2: gradients too; 3: "
        "weights too.",
    )
    precision: Precision = Field("float32", description="Of the forward and backward pass.")
    gradient_checkpointing: bool = Field(
        False, description="Compute activations twice in place of keeping them."
    )
    compile: bool = Field(
        False,
        description="Fuse the student's layers, and on a CPU what is done to logits, as a GPU "
        "always does (torch.compile): faster steps for a slower first one. Not with zero_stage 3 "
        "or adapters.",
    )
    micro_batch_tokens: int = Field(
        4096,
        ge=1,
        description="Tokens in one forward and backward, padding included. The samples of a prompt "
        "are never parted: where they alone are more, they are a micro-batch of their own.",
    )
    lr: float = Field(1e-5, gt=0, description="Learning rate at its peak.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="How it falls from there to the end of the phase."
    )
    lr_warmup_steps: int = Field(0, ge=0, description="Steps of each phase over which it rises.")
    min_lr_ratio: float = Field(
        0.1, ge=0, le=1, description="What is left of it at the end, as a share of the peak."
    )
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.95), description="Of AdamW."
    )
    weight_decay: float = Field(0.0, ge=0, description="Of AdamW.")
    max_grad_norm: float = Field(
        1.0, gt=0, description="L2 norm to which a larger gradient is scaled down."
    )

    @model_validator(mode="after")
    def _compiles_whole_weights(self) -> Learner:
        # Compiled over ZeRO 3's partitioned weights, gradients came out wrong (DeepSpeed 0.19.8).
        if self.compile and self.zero_stage == 3:
            raise ValueError(
                "compile is true, but zero_stage 3 parts the weights that compiled layers read. "
                "Set compile to false, or zero_stage to 2."
            )
        return self
