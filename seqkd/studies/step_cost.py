"""What a step costs, by arithmetic: products, bytes from memory, bytes over links; and what a
schedule makes of it. docs/scaling.md holds it against measurements.

Left out: what a host does between kernels, the sampling of a token from its logits, failures.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np


@dataclass(frozen=True)
class Shape:
    """A causal language model's sizes, from its published config.json."""

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
        """Operations of attention between tokens, forward, where each sees ``length`` others."""
        return 4.0 * self.layers * self.heads * self.head_width * tokens * length

    def cached(self, length: float, number: int) -> float:
        """Bytes of keys and values of ``length`` tokens, with numbers of ``number`` bytes."""
        return 2.0 * self.layers * self.key_values * self.head_width * length * number


@dataclass(frozen=True)
class Chip:
    """A GPU, or a processor's cores."""

    name: str
    products: float
    """Operations a second of a large matrix product."""
    memory: float
    """Bytes a second, read or written."""
    link: float
    """Bytes a second between chips, for gradients."""
    moved: float
    """Bytes a second from the learner's weights into an engine's, digests compared."""
    driver: float
    """Bytes a second of teacher scores from scorers through the driver to learner ranks."""
    number: int
    """Bytes of a weight or state."""
    learn: float
    """Share of ``products`` that a learner's passes reach; ``read`` of an engine that reads many
    tokens at once, ``write`` of ``memory`` of one that writes token by token."""
    read: float
    write: float


@dataclass(frozen=True)
class Work:
    """One step."""

    prompts: int
    samples: int
    prompt: int
    """Tokens of a prompt."""
    completion: float
    """Mean tokens of a completion."""
    limit: int
    """Tokens at which one is cut."""

    @property
    def sequences(self) -> int:
        """Completions."""
        return self.prompts * self.samples

    @property
    def learnt(self) -> float:
        """Their tokens."""
        return self.sequences * self.completion

    @property
    def fed(self) -> float:
        """Tokens that a model reads, prompts once a completion."""
        return self.learnt + self.sequences * self.prompt

    def lengths(self) -> np.ndarray:
        """[prompts, samples] tokens, as if every token were the last with the same probability."""
        uniform = np.random.default_rng(0).random((self.prompts, self.samples))

        def of(ending: float) -> np.ndarray:
            drawn = np.ceil(np.log(uniform) / np.log1p(-ending))
            clipped: np.ndarray = np.clip(drawn, 1, self.limit)
            return clipped

        low, high = 1e-9, 1 - 1e-9
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if of(middle).mean() > self.completion else (low, middle)
        return of(high)


@dataclass(frozen=True)
class Plan:
    """A step and what it runs on."""

    name: str
    student: Shape
    teacher: Shape
    chip: Chip
    work: Work
    engines: int
    scorers: int
    """Chips."""
    ranks: int
    engine_chips: int = 1
    teacher_chips: int = 1
    """Over how many one copy is spread."""
    seats: int = 256
    """Sequences that an engine writes at once."""
    recomputed: bool = False
    """Whether the learner computes activations twice, to keep fewer."""
    batch_tokens: int = 8192


@dataclass(frozen=True)
class Stages:
    """Seconds of each stage by itself, and of its terms."""

    sample: dict[str, float]
    score: dict[str, float]
    driver: dict[str, float]
    sync: dict[str, float]
    learn: dict[str, float]

    def seconds(self, stage: str) -> float:
        """Of a stage: the sum of its terms."""
        terms: dict[str, float] = getattr(self, stage)
        return sum(terms.values())


NAMES = ("sample", "score", "driver", "sync", "learn")


def stages(plan: Plan) -> Stages:
    """Seconds of a step's stages."""
    chip, work, student, teacher = plan.chip, plan.work, plan.student, plan.teacher
    written = plan.chip.memory * chip.write * plan.engine_chips
    weights = student.body + student.head
    together = min(plan.seats, work.sequences / plan.engines)
    tokens = _finished(plan).max()  # that the longest-working seat writes one after the other
    reading = 2 * student.body * work.prompts * work.prompt + student.attended(
        work.prompts * work.prompt, work.prompt / 2
    )
    length = work.prompt + work.completion / 2
    products = 2 * weights * together / (chip.products * chip.read * plan.engine_chips)
    streamed = weights * chip.number / written
    sampling = {
        "products of prompts": reading / (plan.engines * plan.engine_chips)
        / (chip.products * chip.read),
        # A token's products run while its weights come from memory.
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
    moved = weights * chip.number / chip.moved
    passes = 4 if plan.recomputed else 3
    body = 2 * student.body * work.fed + student.attended(work.fed, seen)
    heads = 2 * work.learnt * (3 * student.head + teacher.head)
    learning = {
        "products of layers": passes * body / (plan.ranks * chip.products * chip.learn),
        "products with heads": heads / (plan.ranks * chip.products * chip.learn),
        "gradients between chips": 2 * weights * chip.number * (plan.ranks - 1) / plan.ranks
        / chip.link,
        # Weights and both moments in float32, read and written, and the gradient.
        "optimizer's state from memory": 28 * weights / plan.ranks / chip.memory,
    }  # fmt: skip
    return Stages(
        sample=sampling,
        score=scoring,
        driver={"teacher's states": work.learnt * teacher.width * chip.number / chip.driver},
        sync={"publishing": moved, "loading": moved},
        learn=learning,
    )


def _finished(plan: Plan) -> np.ndarray:
    """[prompts, samples] how many tokens an engine's seat has written one after the other when each
    completion is finished; engines take completions in order."""
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
    """Seconds a step under each."""

    turns: float
    """Stages one after the other."""
    beside: float
    """Scoring beside sampling (placement: split)."""
    ahead: float
    """And both, with what engines load before, beside learning (rollout.max_staleness: 1)."""
    overlapped: float
    """Share of scoring that the second hides behind sampling."""


def schedule(plan: Plan) -> Schedule:
    """A step's stages laid beside each other as the loop does it."""
    of = stages(plan)
    sample, score, driver, sync, learn = (of.seconds(name) for name in NAMES)
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
        turns=sample + score + driver + sync + learn,
        beside=end + sync + learn,
        ahead=of.sync["publishing"] + max(of.sync["loading"] + end, learn),
        overlapped=(sample + score + driver - end) / (score + driver),
    )


def best(plan: Plan, chips: int, least_ranks: int = 1) -> Plan:
    """The split of ``chips`` between the three roles with the shortest step that draws ahead."""
    splits = [
        replace(plan, engines=engines, scorers=scorers, ranks=ranks)
        for scorers in range(plan.teacher_chips, chips, plan.teacher_chips)
        for engines in range(1, (chips - scorers) // plan.engine_chips + 1)
        if (ranks := chips - scorers - engines * plan.engine_chips) >= least_ranks
    ]
    return min(splits, key=lambda split: schedule(split).ahead)


SMOLLM = Shape("SmolLM2-135M", 30, 576, 1536, 9, 3, 64, 49_152)
QWEN_1_5B = Shape("Qwen2.5-1.5B", 28, 1536, 8960, 12, 2, 128, 151_936)
QWEN_7B = Shape("Qwen2.5-7B", 28, 3584, 18_944, 28, 4, 128, 152_064)
LLAMA_8B = Shape("Llama-3.1-8B", 32, 4096, 14_336, 32, 8, 128, 128_256)
LLAMA_70B = Shape("Llama-3.1-70B", 80, 8192, 28_672, 64, 8, 128, 128_256)
