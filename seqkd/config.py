"""The configuration: a frozen schema, unions keyed by ``kind``, and :func:`load`.

Imports no torch, so ``--help`` and every refusal of bad input answer at once. Combinations that
cannot work are refused here, each with the field, the value and the mend.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from seqkd.config_messages import explain
from seqkd.errors import ConfigError

SamplerName = Literal["student", "teacher", "dataset"]
TeacherNeed = Literal["nothing", "logprobs", "hidden"]
Precision = Literal["float32", "bfloat16"]


class _Schema(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=()
    )


# --- objectives: one class a kind. `samplers`, `teacher_need` and `stats` are what the loop and
# --- the learner must provide; the function of the same name lives in seqkd/objectives.


class _Objective(_Schema):
    samplers: ClassVar[tuple[SamplerName, ...]]

    def options(self) -> dict[str, Any]:
        """Keyword arguments of the objective's function."""
        return self.model_dump(exclude={"kind"})

    def stats(self) -> tuple[str, ...]:
        """Names of the :class:`~seqkd.types.TokenStats` fields that the function reads."""
        raise NotImplementedError

    @property
    def needs_rate(self) -> bool:
        """Whether the function reads ``counts.rate`` and ``counts.length``."""
        return False

    @property
    def teacher_need(self) -> TeacherNeed:
        """The least that a teacher must provide for :meth:`stats`."""
        names = set(self.stats())
        if names & {"reverse_kl", "forward_kl"}:
            return "hidden"
        return "logprobs" if "teacher_logprob" in names else "nothing"


class SequenceReverseKL(_Objective):
    """KL(q || p) of whole sequences, by policy gradient on the student's own samples."""

    kind: Literal["sequence_reverse_kl"] = "sequence_reverse_kl"
    estimator: Literal["reinforce", "reward_to_go", "single_step", "rao_blackwell"] = (
        "rao_blackwell"
    )
    baseline: Literal["none", "leave_one_out"] = "leave_one_out"
    normalization: Literal["rate", "total", "minillm"] = "rate"
    samplers: ClassVar = ("student",)

    @model_validator(mode="after")
    def _minillm_has_a_single_step_term(self) -> SequenceReverseKL:
        if self.normalization == "minillm" and self.estimator in ("reinforce", "reward_to_go"):
            raise ValueError(
                f"normalization 'minillm' divides the future return R_(t+1), which estimator "
                f"{self.estimator!r} does not separate. Set estimator to single_step or "
                "rao_blackwell."
            )
        return self

    @property
    def needs_rate(self) -> bool:
        return self.normalization == "rate"

    def stats(self) -> tuple[str, ...]:
        return {
            "reinforce": ("student_logprob", "teacher_logprob"),
            "reward_to_go": ("student_logprob", "teacher_logprob"),
            "single_step": ("student_logprob", "teacher_logprob", "reverse_kl"),
            "rao_blackwell": ("student_logprob", "reverse_kl"),
        }[self.estimator]


class SequenceForwardKL(_Objective):
    """KL(p || q) of whole sequences on teacher samples: -log q(y), y ~ p."""

    kind: Literal["sequence_forward_kl"] = "sequence_forward_kl"
    samplers: ClassVar = ("teacher",)

    def stats(self) -> tuple[str, ...]:
        return ("student_logprob",)


class TokenForwardKL(_Objective):
    """Mean over tokens of KL(p || q) at each state; the states come from any source."""

    kind: Literal["token_forward_kl"] = "token_forward_kl"
    samplers: ClassVar = ("student", "teacher", "dataset")

    def stats(self) -> tuple[str, ...]:
        return ("forward_kl",)


class TokenReverseKL(_Objective):
    """Mean over tokens of KL(q || p) at each state; the states come from any source."""

    kind: Literal["token_reverse_kl"] = "token_reverse_kl"
    samplers: ClassVar = ("student", "teacher", "dataset")

    def stats(self) -> tuple[str, ...]:
        return ("reverse_kl",)


class SFT(_Objective):
    """Mean over tokens of -log q(y_t) on the data set's answers."""

    kind: Literal["sft"] = "sft"
    samplers: ClassVar = ("dataset",)

    def stats(self) -> tuple[str, ...]:
        return ("student_logprob",)


Objective = Annotated[
    SequenceReverseKL | SequenceForwardKL | TokenForwardKL | TokenReverseKL | SFT,
    Field(discriminator="kind"),
]

NATURAL_OBJECTIVE: dict[str, str] = {
    "student": "sequence_reverse_kl",
    "teacher": "sequence_forward_kl",
    "dataset": "sft",
}


# --- models and the actors that hold them


class Checkpoint(_Schema):
    """Start from the model as it is."""

    kind: Literal["checkpoint"] = "checkpoint"


class Prune(_Schema):
    """Start from the model without layers [first, last): depth pruning."""

    kind: Literal["prune"] = "prune"
    drop_layers: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=1)]]

    @field_validator("drop_layers")
    @classmethod
    def _a_range(cls, value: tuple[int, int]) -> tuple[int, int]:
        if value[0] >= value[1]:
            raise ValueError("drop_layers is [first, last) and first must be below last.")
        return value


class Student(_Schema):
    """The model that learns."""

    model: str = Field(description="A local directory or a hub name, in transformers' format.")
    init: Annotated[Checkpoint | Prune, Field(discriminator="kind")] = Checkpoint()


class Actors(_Schema):
    """How many processes a role has and what each of them gets."""

    actors: int = Field(1, ge=1)
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

    precision: Precision = "float32"
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs that share one engine's model.")
    kv_cache_gib: float = Field(1.0, gt=0, description="KV cache of an engine on a CPU.")
    gpu_memory_utilization: float = Field(0.45, gt=0, le=1, description="Share of each GPU.")
    max_num_seqs: int = Field(64, ge=1, description="Sequences an engine runs at once.")
    enforce_eager: bool = True

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
    scores: Literal["hidden", "logprobs"] = Field(
        "hidden", description="hidden: the whole distribution; logprobs: sampled tokens only."
    )
    generation: Engine = Field(
        Engine(),
        description="The vLLM engine with which the teacher writes completions; what is left out "
        "is as for scoring.",
    )

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
    batch_tokens: int = Field(8192, ge=1, description="Tokens scored in one engine step.")


class HfTeacher(_Teacher):
    """A teacher that scores by a transformers forward pass."""

    kind: Literal["hf"] = "hf"
    precision: Precision = "float32"
    batch_tokens: int = Field(4096, ge=1, description="Padded tokens of one forward pass.")


Teacher = Annotated[VllmTeacher | HfTeacher, Field(discriminator="kind")]


class Rollout(Engine):
    """Sampling, by the student or by the teacher."""

    samples_per_prompt: int = Field(4, ge=1)
    max_tokens: int = Field(64, ge=1, description="Longest completion, data set answers too.")
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)


class Learner(_Schema):
    """The DeepSpeed ranks and the optimizer."""

    ranks: int = Field(1, ge=1)
    cpus: int = Field(1, ge=1, description="Threads of each rank.")
    gpus: float = Field(0.0, ge=0, le=1, description="GPUs of each rank.")
    zero_stage: Literal[0, 1, 2, 3] = 2
    precision: Precision = "float32"
    gradient_checkpointing: bool = False
    micro_batch_prompts: int = Field(
        1, ge=1, description="Prompts, with all their samples, in one forward and backward."
    )
    lr: float = Field(1e-5, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    lr_warmup_steps: int = Field(0, ge=0)
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.95,
    )
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)


# --- data, phases, the whole


class JsonlData(_Schema):
    """One JSON object a line: a prompt, optionally an answer."""

    kind: Literal["jsonl"] = "jsonl"
    path: str
    heldout_path: str | None = None
    prompt_key: str = "prompt"
    reference_key: str = Field("reference", description="Answers, for sampler=dataset.")
    chat: bool = Field(True, description="Render with the student's chat template.")
    system: str | None = Field(None, description="System message put before every prompt.")
    max_prompt_tokens: int = Field(512, ge=1, description="Longer prompts are left out, counted.")


class Evaluation(_Schema):
    """Measured on held-out prompts before, between and after the phases."""

    prompts: int = Field(64, ge=0, description="Held-out prompts; 0 turns evaluation off.")
    samples_per_prompt: int = Field(1, ge=1)
    examples: int = Field(3, ge=0, description="Completions shown side by side at the end.")


class Phase(_Schema):
    """One stretch of training with one sampler and one objective."""

    sampler: SamplerName = "student"
    objective: Objective = Field(description="Left out: the natural one of the sampler.")
    steps: int = Field(ge=1)
    prompts_per_step: int = Field(4, ge=1)

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
    def _sampler_fits_objective(self) -> Phase:
        if self.sampler not in self.objective.samplers:
            fits = " or ".join(self.objective.samplers)
            raise ValueError(
                f"objective {self.objective.kind!r} cannot use sampler {self.sampler!r}: it is "
                f"defined on samples of the {fits}. Set sampler to {fits}, or leave the "
                f"objective out to get {NATURAL_OBJECTIVE[self.sampler]!r}."
            )
        return self


class Warmup(Phase):
    """A phase before the main one, with its own samples and learning rate."""

    samples_per_prompt: int = Field(1, ge=1)
    lr: float | None = Field(None, gt=0, description="learner.lr if left out.")


class Config(Phase):
    """Everything a run needs."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    runs_dir: str = "runs"
    seed: int = Field(0, ge=0)
    student: Student
    teacher: Teacher
    data: JsonlData
    rollout: Rollout = Rollout()
    learner: Learner = Learner()
    warmup: Warmup | None = None
    evaluation: Evaluation = Evaluation()
    placement: Literal["colocated", "split"] = Field(
        "colocated",
        description="colocated: roles take turns on the same cores; split: each has its own.",
    )
    cluster: str | None = Field(
        None, description="Ray address; left out: the job's own cluster, or a local one."
    )

    @property
    def phases(self) -> tuple[tuple[str, Phase], ...]:
        """Names and phases in the order in which they run."""
        warmup = (("warmup", self.warmup),) if self.warmup else ()
        return (*warmup, ("main", self))

    def samples_per_prompt(self, phase: Phase) -> int:
        """Samples a prompt in ``phase``; a data set has one answer a prompt."""
        if phase.sampler == "dataset":
            return 1
        return (
            phase.samples_per_prompt
            if isinstance(phase, Warmup)
            else (self.rollout.samples_per_prompt)
        )

    def lr(self, phase: Phase) -> float:
        """Peak learning rate in ``phase``."""
        return (isinstance(phase, Warmup) and phase.lr) or self.learner.lr

    @model_validator(mode="after")
    def _parts_fit(self) -> Config:
        for name, phase in self.phases:
            where = "warmup." if name == "warmup" else ""
            objective = phase.objective
            if objective.teacher_need == "hidden" and self.teacher.scores == "logprobs":
                raise ValueError(
                    f"{where}objective {objective.kind!r} needs the teacher's whole "
                    "distribution, but teacher.scores is 'logprobs'. Set teacher.scores to "
                    "hidden."
                )
            if isinstance(objective, SequenceReverseKL):
                self._on_policy(objective, self.samples_per_prompt(phase), where)
            per_slot = self.learner.ranks * self.learner.micro_batch_prompts
            if phase.prompts_per_step % per_slot:
                raise ValueError(
                    f"{where}prompts_per_step {phase.prompts_per_step} is not a multiple of "
                    f"learner.ranks x learner.micro_batch_prompts = {per_slot}. Set it to "
                    f"{-(-phase.prompts_per_step // per_slot) * per_slot}."
                )
        if self.evaluation.prompts and self.teacher.scores == "logprobs":
            raise ValueError(
                "evaluation needs the teacher's whole distribution, but teacher.scores is "
                "'logprobs'. Set evaluation.prompts to 0 or teacher.scores to hidden."
            )
        if self.evaluation.prompts and self.data.heldout_path is None:
            raise ValueError(
                f"evaluation.prompts is {self.evaluation.prompts}, but data.heldout_path is not "
                "set. Name a file of held-out prompts or set evaluation.prompts to 0."
            )
        return self

    def _on_policy(self, objective: SequenceReverseKL, samples: int, where: str) -> None:
        if self.rollout.temperature != 1 or self.rollout.top_p != 1:
            raise ValueError(
                f"{where}objective 'sequence_reverse_kl' is an expectation under the student "
                f"itself, but rollout draws with temperature {self.rollout.temperature:g} and "
                f"top_p {self.rollout.top_p:g}. Set both to 1."
            )
        if objective.baseline == "leave_one_out" and samples < 2:
            raise ValueError(
                f"{where}objective.baseline 'leave_one_out' compares the samples of a prompt, "
                f"but samples_per_prompt is {samples}. Set it to at least 2, or baseline to none."
            )


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a YAML file, apply ``key=value`` overrides (dotted paths, YAML values), validate.

    Raises ConfigError with one line a problem: field, value, mend.
    """
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file. Name a configuration file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not YAML: {_one_line(error)}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: holds no keys. A configuration is a mapping of keys to values.")
    for override in overrides:
        _apply(data, override)
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        lines = [explain(item, data, Config) for item in error.errors()]
        raise ConfigError("\n".join(f"{path}: {line}" for line in dict.fromkeys(lines))) from None


def dump(config: Config) -> str:
    """The resolved configuration as YAML that :func:`load` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: is not of the form key=value.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"override {override!r}: the value is not YAML: {_one_line(error)}"
        ) from None
    *parents, last = key.split(".")
    node = data
    for depth, name in enumerate(parents):
        if node.get(name) is None:
            node[name] = {}
        node = node[name]
        if not isinstance(node, dict):
            raise ConfigError(
                f"override {override!r}: {'.'.join(parents[: depth + 1])} is the value {node!r}, "
                "so no key below it can be set."
            )
    node[last] = value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
