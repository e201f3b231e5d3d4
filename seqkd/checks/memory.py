"""Estimate of the memory that a run needs.

Included:

- weights, gradients and AdamW states, by precision and ZeRO stage
- activations saved for the longest micro-batch
- key-value caches, output heads and published weights
- teacher scores in transit
- libraries imported by CPU processes

Not included:

- Ray's own processes, allocator overhead and DeepSpeed's communication buffers
- activations of engines
- models that the driver loads and frees before the first step
- host memory of GPU processes

Model sizes are computed from the architecture; no weights are read.

Measured with configs/benchmark.yaml on a CPU (peak resident memory per process, with shared library
pages counted in every process) against the estimate: learner 2.4 GiB against 2.2, student engine
1.8 against 1.3, teacher 2.0 against 1.6, driver 0.7 against 0.7.
On an H100, the learner of a model with the shape of Qwen2.5-1.5B (bfloat16, ZeRO 0, 6,136 tokens
per micro-batch) peaked at 44.1 GiB, or 39.2 GiB with compiled layers. The estimate is 47.7 GiB.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch

from seqkd.config.resources import EngineConfig
from seqkd.config.run import Config
from seqkd.config.student import PruneInitConfig, StudentConfig
from seqkd.config.teacher import LocalTeacherConfig
from seqkd.errors import ResourceError
from seqkd.models.loading import skeleton
from seqkd.models.lora import adapted_layers
from seqkd.models.output_head import BLOCK_ELEMENTS, CHUNK_ELEMENTS
from seqkd.models.pruning import prune

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2}
LOSS_BYTES = {"cpu": (8, 80), "cuda": (14, 0)}
"""Bytes per logit that the loss needs for a chunk of states and for a block of that chunk. The
float32 sum of the head's gradient and its copy come in addition. Measured with vocabularies of
49,152 and 151,936."""
LIBRARIES = {"torch": 0.45, "vllm": 0.7}
"""GiB of a CPU process in addition to its data, measured with very small models. Pages shared by
processes are counted once."""
FIXES = {
    "learner": "Set learner.precision to bfloat16 or learner.gradient_checkpointing to true, or "
    "lower learner.micro_batch_tokens, learner.ranks or rollout.max_tokens.",
    "rollout": "Set rollout.precision to bfloat16, or lower rollout.kv_cache_gib or "
    "rollout.actors.",
    "teacher": "Set teacher.precision to bfloat16, or lower teacher.actors.",
    "teacher_sampler": "Set teacher.generation.precision to bfloat16, or lower "
    "teacher.generation.kv_cache_gib or teacher.generation.actors.",
    "driver": "Lower prompts_per_step, updates_per_rollout or rollout.max_tokens.",
}


@dataclass(frozen=True)
class Need:
    """Memory of each process of a role."""

    role: str
    processes: int
    parts: dict[str, float]
    """GiB by purpose, on the device of the role's model."""
    gpus: float = 0.0
    """GPUs of each process. Above 0, ``parts`` is GPU memory."""
    utilization: float = 0.0
    """Share of its GPUs that an engine reserves regardless of its need; 0 for other roles."""
    teacher: str = ""
    """Name of the teacher, if there are several teachers."""

    @property
    def each(self) -> float:
        """GiB of one process."""
        return sum(self.parts.values())

    @property
    def total(self) -> float:
        """GiB of all processes."""
        return self.each * self.processes

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {gib:.2f}" for name, gib in self.parts.items() if gib >= 0.005)
        return f"{f'{self.role} {self.teacher}':<17}{self.processes} x {self.each:7.2f}  {parts}"


@dataclass(frozen=True)
class Size:
    """Size of one model."""

    parameters: int
    head: int
    """Elements of the output head."""
    hidden: int
    saved: int
    """Elements saved per token for the backward pass, without checkpointing."""
    layers: int
    adapters: int = 0
    """Parameters of the adapters, the only ones trained if there are any; 0 without adapters."""
    adapted: int = 0
    """Parameters of the weights that have adapters."""


def size_of(model: Any, student: StudentConfig | None = None) -> Size:
    """Return the size of the model of a transformers config, or of the student that is initialized
    from it. The weights are not read."""
    built: Any = skeleton(model)
    if student is not None and isinstance(student.init, PruneInitConfig):
        prune(built, student.init)
    lora = student.lora if student is not None else None
    adapted = list(adapted_layers(built, lora).values()) if lora else []
    rank = lora.rank if lora else 0
    hidden, layers = model.hidden_size, built.config.num_hidden_layers
    inner = getattr(model, "intermediate_size", None) or 4 * hidden
    # A layer keeps the inputs of its norms, matrices and products: about six times the residual
    # stream (norms, q, k, v, attention) and four times the inner width.
    return Size(
        parameters=sum(p.numel() for p in built.parameters()),
        head=model.vocab_size * hidden,
        hidden=hidden,
        # An adapter keeps A x in addition to its input.
        saved=layers * (7 * hidden + 4 * inner) + rank * len(adapted),
        layers=layers,
        adapters=sum(rank * (layer.in_features + layer.out_features) for layer in adapted),
        adapted=sum(layer.weight.numel() for layer in adapted),
    )


def estimate(
    config: Config, student: Any, teachers: Mapping[str, Any], roles: Collection[str]
) -> list[Need]:
    """Return the memory needs of all ``roles`` and of the driver. ``student`` and ``teachers``
    (local teachers, by name) are transformers configs."""
    student_size = size_of(student, config.student)
    teacher_sizes = {name: size_of(teacher) for name, teacher in teachers.items()}
    needs = [_learner(config, student_size, teacher_sizes)]
    if "rollout" in roles:
        needs.append(_engine("rollout", config.rollout, student_size))
    for name, size in teacher_sizes.items():
        teacher = config.teachers[name].local
        assert teacher is not None
        needs += [replace(need, teacher=name) for need in _teacher(teacher, size, roles)]
    return [*needs, _driver(config, student_size, teacher_sizes)]


def _learner(config: Config, student: Size, teachers: Mapping[str, Size]) -> Need:
    learner = config.learner
    width, ranks = BYTES[learner.precision], learner.ranks
    stage = learner.zero_stage
    of_weights = width / (ranks if stage == 3 else 1)
    of_gradients = width / (ranks if stage >= 2 else 1)
    of_states = 8 / (ranks if stage else 1)
    # DeepSpeed keeps float32 copies of the parameters that it updates, except with ZeRO 0 in
    # float32, which is plain AdamW.
    if stage or learner.precision == "bfloat16":
        of_states += 8 / (ranks if stage else 1)
    longest = config.data.max_prompt_tokens + config.rollout.max_tokens
    tokens = samples = 0
    for _, phase in config.phases:
        samples = max(samples, config.samples_per_prompt(phase))
        group = config.samples_per_prompt(phase) * longest
        of_rank = -(-phase.prompts_per_step // ranks) * group
        tokens = max(tokens, min(of_rank, max(group, learner.micro_batch_tokens)))
    device, vocabulary = "cuda" if learner.gpus else "cpu", student.head // student.hidden
    chunk = min(CHUNK_ELEMENTS[device], tokens * vocabulary)
    block = min(chunk, max(BLOCK_ELEMENTS[device], samples * vocabulary))
    of_chunk, of_block = LOSS_BYTES[device]
    head = 0 if student.adapters else student.head  # trained elements of the head
    saved = student.saved
    if learner.gradient_checkpointing:
        saved = student.layers * student.hidden + saved // student.layers
    trained = student.adapters or student.parameters
    parts = {
        "weights": (student.parameters + student.adapters) * of_weights,
        "gradients": trained * of_gradients,
        "optimizer": trained * of_states,
        # Merged on the host when weights are published.
        "merged weights": 0 if learner.gpus else student.adapted * width,
        "activations": tokens * saved * width,
        "loss": of_chunk * chunk + of_block * block + head * (4 + (width if width < 4 else 0)),
        "teachers' heads": sum(
            size.head * BYTES[config.teachers[name].precision]
            for name, size in teachers.items()
            if config.teacher.scores == "hidden"
        ),
    }
    return _need("learner", ranks, parts, learner.gpus)


def _engine(role: str, engine: EngineConfig, size: Size, head: int = 0) -> Need:
    width = BYTES[engine.precision]
    parts: dict[str, float] = {"weights": size.parameters * width, "scoring head": head}
    if engine.gpus:
        return _need(
            role, engine.actors, parts, engine.gpus, utilization=engine.gpu_memory_utilization
        )
    # A CPU engine computes with a packed copy of the head in addition to the embedding.
    parts |= {"packed head": size.head * width, "KV cache": engine.kv_cache_gib * GIB}
    return _need(role, engine.actors, parts, libraries="vllm")


def _teacher(teacher: LocalTeacherConfig, size: Size, roles: Collection[str]) -> Iterator[Need]:
    width = BYTES[teacher.precision]
    if "teacher" in roles and teacher.engine is None:
        # No backward pass: only the activations of one layer at a time.
        working = teacher.batch_tokens * size.saved // size.layers
        parts: dict[str, float] = {
            "weights": size.parameters * width,
            "activations": working * width,
        }
        yield _need("teacher", teacher.actors, parts, teacher.gpus)
    elif "teacher" in roles and teacher.engine is not None:
        head = 0 if teacher.scores == "hidden" else size.head * width
        yield _engine("teacher", teacher.engine, size, head)
    if "teacher_sampler" in roles:
        yield _engine("teacher_sampler", teacher.generation, size)


def _driver(config: Config, student: Size, teachers: Mapping[str, Size]) -> Need:
    """Return the needs of the driver and of the node's shared memory, which contains published
    weights and scores in transit."""
    in_transit = 0
    if config.teacher.scores == "hidden":
        completions = max(
            phase.prompts_per_step * phase.updates_per_rollout * config.samples_per_prompt(phase)
            for _, phase in config.phases
        )
        widest = max(size.hidden for size in teachers.values())
        # Three float32 copies: received from the teacher, packed for the ranks, and in transit to
        # the ranks. When sampling ahead, the scores of the next draw are a fourth.
        copies = 4 if any(config.draws_ahead(phase) for _, phase in config.phases) else 3
        in_transit = completions * config.rollout.max_tokens * widest * 4 * copies
    published = student.parameters * BYTES[config.learner.precision]
    return _need("driver", 1, {"published weights": published, "scores in transit": in_transit})


def _need(
    role: str,
    processes: int,
    parts: Mapping[str, float],
    gpus: float = 0.0,
    libraries: str = "torch",
    utilization: float = 0.0,
) -> Need:
    gib = {name: amount / GIB for name, amount in parts.items()}
    if not gpus:
        gib["libraries"] = LIBRARIES[libraries]
    return Need(role, processes, gib, gpus, utilization)


Pool = tuple[float, float]
"""Memory in GiB: total and currently available."""


def host_memory() -> Pool:
    """Return the memory of this machine."""
    memory = psutil.virtual_memory()
    return memory.total / GIB, memory.available / GIB


def gpu_memory() -> list[Pool]:
    """Return the memory of each GPU of this machine."""
    pairs = [torch.cuda.mem_get_info(i) for i in range(torch.cuda.device_count())]
    return [(total / GIB, free / GIB) for free, total in pairs]


def check_memory(needs: Sequence[Need], host: Pool, gpus: Sequence[Pool]) -> str | None:
    """Return a warning if the run needs more memory than is free now. Raises ResourceError if it
    needs more than the machine has."""
    on_host = [need for need in needs if not need.gpus]
    on_gpus = [need for need in needs if need.gpus]
    warnings = [_compare("memory", sum(n.total for n in on_host), on_host, host)]
    if on_gpus and gpus:
        one = min(total for total, _ in gpus)
        for need in on_gpus:
            room = one * max(1.0, need.gpus) * (need.utilization or 1.0)
            if need.each > room:
                raise ResourceError(
                    f"{need.role}: each process needs an estimated {need.each:.1f} GiB of GPU "
                    f"memory but has {room:.1f} GiB. {FIXES[need.role]}"
                )
        taken = sum(
            n.processes * (one * max(1.0, n.gpus) * n.utilization if n.utilization else n.each)
            for n in on_gpus
        )
        both = sum(total for total, _ in gpus), sum(free for _, free in gpus)
        warnings.append(_compare("GPU memory", taken, on_gpus, both))
    return "\n".join(w for w in warnings if w) or None


def _compare(what: str, need: float, needs: Sequence[Need], pool: Pool) -> str | None:
    total, available = pool
    text = f"the run needs an estimated {need:.1f} GiB of {what}, but this machine has {total:.1f}"
    largest = max(needs, key=lambda n: n.total, default=None)
    if largest is None or need <= available:
        return None
    fix = f"Most of it is for {largest.role} ({largest.total:.1f} GiB). {FIXES[largest.role]}"
    if need > total:
        raise ResourceError(f"{text} GiB. {fix}")
    return f"{text} GiB, of which {available:.1f} GiB are free now. {fix}"
