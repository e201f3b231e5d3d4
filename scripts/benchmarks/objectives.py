"""A loss from hidden states, in chunks, against one from whole logits: time and peak memory.

On a CPU each case runs in its own process (python -m scripts.benchmarks.objectives CASE), which
prints JSON, so that its peak memory is known.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from actors.placement import KEEP_FREED
from scripts.benchmarks.rows import Row

GIB = 2**30
CASES = {
    "cpu": [(49_152, 512), (49_152, 2048), (151_936, 512), (151_936, 2048), (151_936, 8192)],
    "cuda": [(49_152, 32_768), (151_936, 2048), (151_936, 8192), (151_936, 32_768)],
}  # fmt: skip
"""(V, T)"""
WHOLE = {"cpu": 2048, "cuda": 4096}
"""The longest that the naive way has memory for: a dozen [T, V] tensors."""
SIZES = {"cpu": (576, 576, "float32"), "cuda": (1536, 3584, "bfloat16")}
"""Hidden sizes of student and teacher, and their precision."""


def measure(repetitions: int, device: str = "cpu") -> Iterator[Row]:
    """Sequence-level reverse KL of one completion of T tokens, forward and backward."""
    section = "objectives" if device == "cpu" else "objectives on the GPU"
    for vocabulary, tokens in CASES[device]:
        what = f"V = {vocabulary:,}, T = {tokens:,}"
        whole = min(tokens, WHOLE[device])
        against = ("whole logits" if device == "cpu" else "whole logits, not compiled") + (
            "" if whole == tokens else f", {whole:,} tokens, times {tokens // whole}"
        )
        seconds = Row(section, f"{what}: time", "s", against, 1.0)
        limit = 0.1 if tokens == 8192 else None
        memory = Row(section, f"{what}: peak memory", "GiB", "one [T, V] float32 tensor", limit)
        case = {"device": device, "vocabulary": vocabulary}
        for _ in range(repetitions):
            ours = _measured(case | {"way": "chunks", "tokens": tokens})
            theirs = _measured(case | {"way": "whole", "tokens": whole})
            seconds.add(ours["seconds"], theirs["seconds"] * tokens / whole)
            memory.add(ours["gib"], vocabulary * tokens * 4 / GIB)
        yield from (seconds, memory)


def _measured(case: dict[str, Any]) -> dict[str, float]:
    if case["device"] == "cuda":
        return _passes(case)
    command = [sys.executable, "-m", "scripts.benchmarks.objectives", json.dumps(case)]
    environment = {**os.environ, **KEEP_FREED}  # as an actor has it
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _passes(case: dict[str, Any]) -> dict[str, float]:
    """Seconds of one forward and backward pass, on a GPU the median of three, and GiB that the peak
    of memory grew by beyond the gradients, which stay."""
    import torch

    small, _ = _loss(case | {"vocabulary": 64, "tokens": 4})
    small().backward()  # what torch imports at first use
    (loss, learnt), on_gpu = _loss(case), case["device"] == "cuda"

    def forget() -> None:
        for tensor in learnt:
            tensor.grad = None

    def seconds() -> float:
        forget()
        start = time.perf_counter()
        loss().backward()
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    if on_gpu:
        seconds()  # compiles
        forget()
        torch.cuda.reset_peak_memory_stats()
    else:  # what was made on the way to here is no peak of the loss
        Path("/proc/self/clear_refs").write_text("5")
    before = _memory(on_gpu, peak=False)
    passes = [seconds() for _ in range(3 if on_gpu else 1)]
    kept = sum(tensor.nbytes for tensor in learnt)
    return {"seconds": median(passes), "gib": (_memory(on_gpu, peak=True) - before - kept) / GIB}


def _memory(on_gpu: bool, peak: bool) -> float:
    """Bytes."""
    import torch

    if on_gpu:
        read = torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated
        return float(read())
    name = "VmHWM" if peak else "VmRSS"
    status = Path("/proc/self/status").read_text()
    return float(status.split(f"{name}:")[1].split()[0]) * 1024


def _loss(case: dict[str, Any]) -> tuple[Callable[[], Any], tuple[Any, Any]]:
    """The forward pass; and what is to have a gradient, the head's weight and the states."""
    import torch

    from seqkd.learner.student import as_token_stats
    from seqkd.learner.teacher_distribution import FullTeacher
    from seqkd.learner.token_stats import stats_of_logits, token_loss
    from seqkd.models.output_head import OutputHead
    from seqkd.objectives import OBJECTIVES
    from seqkd.types import Counts, TrainBatch

    torch.manual_seed(0)
    vocabulary, tokens, device = case["vocabulary"], case["tokens"], case["device"]
    width, theirs_width, precision = SIZES[device]
    made = {"device": device, "dtype": getattr(torch, precision)}
    weight = (torch.randn(vocabulary, width, **made) / width**0.5).requires_grad_()
    theirs = torch.randn(vocabulary, theirs_width, **made) / theirs_width**0.5
    hidden = torch.randn(tokens, width, **made).requires_grad_()
    states = torch.randn(tokens, theirs_width, **made)
    targets = torch.randint(vocabulary, (tokens,), device=device)
    names = ("student_logprob", "entropy", "teacher_logprob", "reverse_kl", "forward_kl")
    one = torch.zeros(1, dtype=torch.long, device=device)
    batch = TrainBatch(
        input_ids=one[None], attention_mask=one[None], position_ids=None, segment=None,
        state_row=one, state_index=one[None], target_ids=targets[None],
        loss_mask=torch.ones(1, tokens, dtype=torch.bool, device=device), group=one,
        rollout_logprobs=None, by_teacher=one.bool(),
    )  # fmt: skip

    def objective(stats: Any) -> Any:
        laid_out = {name: value.view(1, tokens) for name, value in stats.items()}
        read = as_token_stats(batch, laid_out)
        return OBJECTIVES["sequence_reverse_kl"](read, Counts(1, tokens), baseline="none")

    def chunks() -> Any:
        known = FullTeacher(states, OutputHead(theirs))
        place = torch.arange(tokens, device=device), torch.zeros_like(targets)
        return token_loss(hidden, OutputHead(weight), targets, names, known, objective, *place)[0]

    def whole() -> Any:
        logits = [(h @ w.T).float() for h, w in ((hidden, weight), (states, theirs))]
        return objective(stats_of_logits(logits[0], logits[1], targets, names))

    return (chunks if case["way"] == "chunks" else whole), (weight, hidden)


if __name__ == "__main__":
    print(json.dumps(_passes(json.loads(sys.argv[1]))))
