"""Time and peak memory of a chunked loss from hidden states against a loss from full logits.

On a CPU each case runs in its own process, so that its peak memory can be measured.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch

from actors.placement import KEEP_FREED
from scripts.benchmarks.rows import Row
from seqkd.learner.teacher_distribution import FullTeacher
from seqkd.learner.token_stats import stats_of_logits, token_loss
from seqkd.models.output_head import OutputHead
from seqkd.objectives import OBJECTIVES
from seqkd.types import Counts, TokenStats

GIB = 2**30
CASES = {
    "cpu": [(49_152, 512), (49_152, 2048), (151_936, 512), (151_936, 2048), (151_936, 8192)],
    "cuda": [(49_152, 32_768), (151_936, 2048), (151_936, 8192), (151_936, 32_768)],
}  # fmt: skip
"""Vocabulary sizes V and completion lengths T."""
WHOLE = {"cpu": 2048, "cuda": 4096}
"""Longest completion for which full logits, a dozen [T, V] tensors, fit in memory."""
SIZES = {"cpu": (576, 576, torch.float32), "cuda": (1536, 3584, torch.bfloat16)}
"""Hidden sizes of student and teacher, and their precision."""
STATS = ("student_logprob", "entropy", "teacher_logprob", "reverse_kl", "forward_kl")


def measure(file: str, repetitions: int, device: str = "cpu") -> Iterator[Row]:
    """Measure sequence-level reverse KL of one completion of T tokens, forward and backward."""
    section, compiled = ("objectives", "") if device == "cpu" else (
        "objectives on the GPU", ", not compiled")  # fmt: skip
    for vocabulary, tokens in CASES[device]:
        name = f"V = {vocabulary:,}, T = {tokens:,}"
        whole = min(tokens, WHOLE[device])
        times = "" if whole == tokens else f", {whole:,} tokens, times {tokens // whole}"
        seconds = Row(section, f"{name}: time", "s", f"full logits{compiled}{times}", 1.0)
        limit = 0.1 if tokens == 8192 else None
        memory = Row(section, f"{name}: peak memory", "GiB", "one [T, V] float32 tensor", limit)
        for _ in range(repetitions):
            chunks = _case(device, vocabulary, tokens, True)
            reference = _case(device, vocabulary, whole, False)
            seconds.add(chunks[0], reference[0] * tokens / whole)
            memory.add(chunks[1], vocabulary * tokens * 4 / GIB)
        yield from (seconds, memory)


def _case(device: str, *case: Any) -> tuple[float, float]:
    """Run :func:`_passes`, on a CPU in a new process with the allocator settings of an actor."""
    if device == "cuda":
        return _passes(device, *case)
    os.environ.update(KEEP_FREED)
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(_passes, device, *case).result()


def _passes(device: str, vocabulary: int, tokens: int, chunked: bool) -> tuple[float, float]:
    """Return the seconds of one forward and backward pass (on a GPU the median of three), and the
    peak memory growth in GiB, without the gradients."""
    small, _ = _loss(device, 64, 4, chunked)
    small().backward()  # torch imports modules at first use
    loss, leaves = _loss(device, vocabulary, tokens, chunked)

    def seconds() -> float:
        for leaf in leaves:
            leaf.grad = None
        start = time.perf_counter()
        loss().backward()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    if device == "cuda":
        seconds()  # compiles
        for leaf in leaves:
            leaf.grad = None
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak of the process
    before = _peak(device)
    passes = [seconds() for _ in range(3 if device == "cuda" else 1)]
    gradients = sum(leaf.nbytes for leaf in leaves)
    return median(passes), (_peak(device) - before - gradients) / GIB


def _peak(device: str) -> int:
    """Return the peak memory of the GPU or of the process in bytes."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _loss(
    device: str, vocabulary: int, tokens: int, chunked: bool
) -> tuple[Callable[[], Any], tuple[torch.Tensor, torch.Tensor]]:
    """Return the forward pass and the leaves of its graph (the head's weight and the states)."""
    torch.manual_seed(0)
    width, teacher_width, precision = SIZES[device]

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=precision)

    weight = (random(vocabulary, width) / width**0.5).requires_grad_()
    teacher_weight = random(vocabulary, teacher_width) / teacher_width**0.5
    hidden = random(tokens, width).requires_grad_()
    teacher_hidden = random(tokens, teacher_width)
    targets = torch.randint(vocabulary, (tokens,), device=device)
    mask = torch.ones(1, tokens, dtype=torch.bool, device=device)
    group = torch.zeros(1, dtype=torch.long, device=device)

    def objective(stats: Any) -> Any:
        values: Any = {name: stats[name].view(1, tokens) for name in STATS}
        read = TokenStats(mask, group, **values)
        return OBJECTIVES["sequence_reverse_kl"](read, Counts(1, tokens), baseline="none")

    def from_states() -> Any:
        teacher = FullTeacher(teacher_hidden, OutputHead(teacher_weight))
        place = torch.arange(tokens, device=device), torch.zeros_like(targets)
        return token_loss(hidden, OutputHead(weight), targets, STATS, teacher, objective, *place)[0]

    def from_logits() -> Any:
        logits = (hidden @ weight.T).float(), (teacher_hidden @ teacher_weight.T).float()
        return objective(stats_of_logits(*logits, targets, STATS))

    return (from_states if chunked else from_logits), (weight, hidden)
