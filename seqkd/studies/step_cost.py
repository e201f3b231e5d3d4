"""Cost model of an optimizer step: matrix products, memory traffic, link traffic, and the schedule
of the stages. docs/scaling.md compares it with measurements.

Not included: host time between kernels, sampling of tokens from logits, failures.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from scipy.optimize import bisect


@dataclass(frozen=True)
class Shape:
    """Sizes of a causal language model, from its published config.json."""

    name: str
    layers: int
    width: int
    inner: int
    heads: int
    key_values: int
    head_width: int
    vocabulary: int

    @property
    def body(self) -> int:
        """Parameters of the layers."""
        attention = 2 * self.width * self.head_width * (self.heads + self.key_values)
        return self.layers * (attention + 3 * self.width * self.inner)

    @property
    def head(self) -> int:
        """Parameters of the output head."""
        return self.vocabulary * self.width

    def attended(self, tokens: float, length: float) -> float:
        """Return the operations of forward attention if each token attends to ``length``
        tokens."""
        return 4.0 * self.layers * self.heads * self.head_width * tokens * length

    def cached(self, length: float, number: int) -> float:
        """Return the bytes of keys and values of ``length`` tokens, ``number`` bytes per value."""
        return 2.0 * self.layers * self.key_values * self.head_width * length * number


@dataclass(frozen=True)
class Chip:
    """Speed and memory of one GPU, or of the cores of one CPU."""

    name: str
    products: float
    """Throughput of large matrix products, operations per second."""
    memory: float
    """Memory bandwidth, bytes per second."""
    link: float
    """Bandwidth between chips for gradients, bytes per second."""
    moved: float
    """Throughput of weights from the learner into an engine, including digests, bytes per
    second."""
    driver: float
    """Throughput of teacher scores from scorers through the driver to learner ranks, bytes per
    second."""
    number: int
    """Bytes per weight or state value."""
    learn: float
    """Fraction of ``products`` achieved by the learner's passes."""
    read: float
    """Fraction of ``products`` achieved by an engine that processes many tokens at once."""
    write: float
    """Fraction of ``memory`` achieved by an engine that decodes token by token."""


@dataclass(frozen=True)
class Work:
    """Workload of one step."""

    prompts: int
    samples: int
    prompt: int
    """Tokens per prompt."""
    completion: float
    """Mean tokens per completion."""
    limit: int
    """Maximum tokens per completion."""

    @property
    def sequences(self) -> int:
        """Number of completions."""
        return self.prompts * self.samples

    @property
    def completion_tokens(self) -> float:
        """Tokens of all completions."""
        return self.sequences * self.completion

    @property
    def fed(self) -> float:
        """Tokens of all completions with their prompts."""
        return self.completion_tokens + self.sequences * self.prompt

    def lengths(self) -> np.ndarray:
        """Return [prompts, samples] completion lengths, if every token ends the completion with the
        same probability."""
        uniform = np.random.default_rng(0).random((self.prompts, self.samples))

        def draw(ending: float) -> np.ndarray:
            lengths = np.ceil(np.log(uniform) / np.log1p(-ending))
            clipped: np.ndarray = np.clip(lengths, 1, self.limit)
            return clipped

        def excess(ending: float) -> float:
            return float(draw(ending).mean() - self.completion)

        return draw(bisect(excess, 1e-9, 1 - 1e-9))


@dataclass(frozen=True)
class Plan:
    """Workload, models and the assignment of chips."""

    name: str
    student: Shape
    teacher: Shape
    chip: Chip
    work: Work
    engines: int
    scorers: int
    """Number of chips that score."""
    ranks: int
    """Number of learner ranks, one chip each."""
    engine_chips: int = 1
    """Chips per engine."""
    teacher_chips: int = 1
    """Chips per copy of the teacher."""
    seats: int = 256
    """Maximum number of concurrent sequences of an engine."""
    recomputed: bool = False
    """True if the learner recomputes activations to save memory (gradient checkpointing)."""
    batch_tokens: int = 8192


@dataclass(frozen=True)
class Stages:
    """Seconds of each stage without overlap, by term."""

    sample: dict[str, float]
    score: dict[str, float]
    driver: dict[str, float]
    sync: dict[str, float]
    learn: dict[str, float]

    def seconds(self, stage: str) -> float:
        """Return the sum of a stage's terms."""
        terms: dict[str, float] = getattr(self, stage)
        return sum(terms.values())


NAMES = ("sample", "score", "driver", "sync", "learn")


def stages(plan: Plan) -> Stages:
    """Return the seconds of the stages of a step."""
    chip, work, student, teacher = plan.chip, plan.work, plan.student, plan.teacher
    written = plan.chip.memory * chip.write * plan.engine_chips
    weights = student.body + student.head
    together = min(plan.seats, work.sequences / plan.engines)
    tokens = _finished(plan).max()  # decoding steps of the longest seat
    reading = 2 * student.body * work.prompts * work.prompt + student.attended(
        work.prompts * work.prompt, work.prompt / 2
    )
    length = work.prompt + work.completion / 2
    products = 2 * weights * together / (chip.products * chip.read * plan.engine_chips)
    streamed = weights * chip.number / written
    sampling = {
        "products of prompts": reading / (plan.engines * plan.engine_chips)
        / (chip.products * chip.read),
        # The products of a token overlap with loading the weights from memory.
        "weights from memory": tokens * streamed,
        "products of tokens": tokens * max(0.0, products - streamed),
        "keys and values from memory": tokens
        * student.cached(length, chip.number) * together / written,
    }  # fmt: skip
    seen = (work.prompt + work.completion) / 2
    scoring = {
        "products": (2 * teacher.body * work.fed + teacher.attended(work.fed, seen))
        / (plan.scorers * chip.products * chip.read)
    }
    states = work.completion_tokens * teacher.width * chip.number
    moved = weights * chip.number / chip.moved
    passes = 4 if plan.recomputed else 3
    body = 2 * student.body * work.fed + student.attended(work.fed, seen)
    heads = 2 * work.completion_tokens * (3 * student.head + teacher.head)
    learning = {
        "products of layers": passes * body / (plan.ranks * chip.products * chip.learn),
        "products with heads": heads / (plan.ranks * chip.products * chip.learn),
        "gradients between chips": 2 * weights * chip.number * (plan.ranks - 1) / plan.ranks
        / chip.link,
        # Weights and both moments in float32, each read and written, and the gradient.
        "optimizer's state from memory": 28 * weights / plan.ranks / chip.memory,
    }  # fmt: skip
    return Stages(
        sample=sampling,
        score=scoring,
        driver={"teacher's states": states / chip.driver},
        sync={"publishing": moved, "loading": moved},
        learn=learning,
    )


def _finished(plan: Plan) -> np.ndarray:
    """Return [prompts, samples] the number of tokens that a seat of an engine has generated at the
    end of each completion. A seat generates one completion at a time; engines start completions in
    order."""
    lengths = plan.work.lengths()
    ends = np.zeros_like(lengths)
    for engine in range(plan.engines):
        free = [0.0] * plan.seats
        for prompt in range(engine, len(lengths), plan.engines):
            for sample, length in enumerate(lengths[prompt]):
                ends[prompt, sample] = heapq.heappop(free) + length
                heapq.heappush(free, ends[prompt, sample])
    return ends


@dataclass(frozen=True)
class Schedule:
    """Seconds of a step under each schedule."""

    sequential: float
    """All stages in sequence."""
    split: float
    """Scoring in parallel with sampling (placement: split)."""
    prefetched: float
    """Loading, sampling and scoring also in parallel with learning (max_off_policy_steps: 1)."""
    hidden: float
    """Fraction of scoring time that ``split`` overlaps with sampling."""


def schedule(plan: Plan) -> Schedule:
    """Return the seconds of a step with the overlap of the training loop."""
    costs = stages(plan)
    sample, score, driver, sync, learn = (costs.seconds(name) for name in NAMES)
    work = plan.work
    together = -(
        -plan.batch_tokens * plan.scorers // plan.teacher_chips // (work.prompt + work.limit)
    )
    ends, tokens = _finished(plan).ravel(), (work.lengths() + work.prompt).ravel()
    order = np.argsort(ends, kind="stable")
    ready, shares = sample * ends[order] / ends.max(), tokens[order] / tokens.sum()
    end = 0.0
    for first, last in pairwise([*range(0, work.sequences, together), work.sequences]):
        end = max(end, ready[last - 1]) + (score + driver) * shares[first:last].sum()
    return Schedule(
        sequential=sample + score + driver + sync + learn,
        split=end + sync + learn,
        prefetched=costs.sync["publishing"] + max(costs.sync["loading"] + end, learn),
        hidden=(sample + score + driver - end) / (score + driver),
    )


def best(plan: Plan, chips: int, least_ranks: int = 1) -> Plan:
    """Return the assignment of ``chips`` to roles with the shortest prefetched step."""
    splits = [
        replace(plan, engines=engines, scorers=scorers, ranks=ranks)
        for scorers in range(plan.teacher_chips, chips, plan.teacher_chips)
        for engines in range(1, (chips - scorers) // plan.engine_chips + 1)
        if (ranks := chips - scorers - engines * plan.engine_chips) >= least_ranks
    ]
    return min(splits, key=lambda split: schedule(split).prefetched)


SMOLLM = Shape("SmolLM2-135M", 30, 576, 1536, 9, 3, 64, 49_152)
QWEN_1_5B = Shape("Qwen2.5-1.5B", 28, 1536, 8960, 12, 2, 128, 151_936)
QWEN_7B = Shape("Qwen2.5-7B", 28, 3584, 18_944, 28, 4, 128, 152_064)
LLAMA_8B = Shape("Llama-3.1-8B", 32, 4096, 14_336, 32, 8, 128, 128_256)
LLAMA_70B = Shape("Llama-3.1-70B", 80, 8192, 28_672, 64, 8, 128, 128_256)
