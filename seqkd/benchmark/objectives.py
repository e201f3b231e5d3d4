"""A loss from hidden states, in chunks, against one from whole logits: time and peak memory, each
case a process of its own: python -m seqkd.benchmark.objectives CASE, which prints JSON."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from statistics import median
from typing import Any

from seqkd.benchmark.rows import Row

GIB = 2**30
HIDDEN = 576
CASES = [
    (49_152, 512),
    (49_152, 2048),
    (151_936, 512),
    (151_936, 2048),
    (151_936, 8192),
    (49_152, 32_768),
]
"""(V, T)"""
WHOLE = 2048
"""The longest that the naive way has memory for: six [T, V] float32 tensors."""


def measure(repetitions: int) -> list[Row]:
    """Sequence-level reverse KL of one completion of T tokens, forward and backward."""
    rows = []
    for vocabulary, tokens in CASES:
        what = f"V = {vocabulary:,}, T = {tokens:,}"
        whole = min(tokens, WHOLE)
        against = "whole logits" + (
            "" if whole == tokens else f", {whole:,} tokens, times {tokens // whole}"
        )
        seconds = Row("objectives", f"{what}: time", "s", against, 1.0)
        memory = Row("objectives", f"{what}: peak memory", "GiB", "one [T, V] float32 tensor", 0.1)
        for _ in range(repetitions):
            ours = _case({"way": "chunks", "vocabulary": vocabulary, "tokens": tokens})
            theirs = _case({"way": "whole", "vocabulary": vocabulary, "tokens": whole})
            seconds.add(ours["seconds"], theirs["seconds"] * tokens / whole)
            memory.add(ours["gib"], vocabulary * tokens * 4 / GIB)
        rows += [seconds, memory]
    return rows


def _case(case: dict[str, Any]) -> dict[str, float]:
    command = [sys.executable, "-m", "seqkd.benchmark.objectives", json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(case: dict[str, Any]) -> None:
    """Print the seconds of one forward and backward pass, the median of three, and what the peak of
    resident memory grew by."""
    import torch

    from seqkd.models import as_token_stats
    from seqkd.objectives import OBJECTIVES
    from seqkd.token_stats import FullTeacher, OutputHead, stats_of_logits, token_loss
    from seqkd.types import Counts, TrainBatch

    torch.manual_seed(0)
    vocabulary, tokens = case["vocabulary"], case["tokens"]
    weight = (torch.randn(vocabulary, HIDDEN) / HIDDEN**0.5).requires_grad_()
    theirs = torch.randn(vocabulary, HIDDEN) / HIDDEN**0.5
    hidden = torch.randn(tokens, HIDDEN, requires_grad=True)
    states, targets = torch.randn(tokens, HIDDEN), torch.randint(vocabulary, (tokens,))
    # The gradients themselves are no memory of the loss.
    weight.grad, hidden.grad = torch.zeros_like(weight), torch.zeros_like(hidden)
    names = ("student_logprob", "entropy", "teacher_logprob", "reverse_kl", "forward_kl")
    one = torch.zeros(1, dtype=torch.long)
    batch = TrainBatch(
        input_ids=one[None], attention_mask=one[None], position_ids=None, segment=None,
        state_row=one, state_index=one[None], target_ids=targets[None],
        loss_mask=torch.ones(1, tokens, dtype=torch.bool), group=one, rollout_logprobs=None,
        by_teacher=one.bool(),
    )  # fmt: skip

    def objective(stats: Any) -> Any:
        laid_out = {name: value.view(1, tokens) for name, value in stats.items()}
        read = as_token_stats(batch, laid_out)
        return OBJECTIVES["sequence_reverse_kl"](read, Counts(1, tokens), baseline="none")

    def chunks() -> Any:
        known = FullTeacher(states, OutputHead(theirs))
        place = torch.arange(tokens), torch.zeros(tokens, dtype=torch.long)
        return token_loss(hidden, OutputHead(weight), targets, names, known, objective, *place)[0]

    def whole() -> Any:
        return objective(stats_of_logits(hidden @ weight.T, states @ theirs.T, targets, names))

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        (chunks if case["way"] == "chunks" else whole)().backward()
        seconds.append(time.perf_counter() - start)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps({"seconds": median(seconds), "gib": grown * 1024 / GIB}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
