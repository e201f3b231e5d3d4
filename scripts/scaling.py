"""What a step would cost on other machines, by arithmetic: python scripts/scaling.py

docs/scaling.md says what is counted and how it compares with what was measured.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

from seqkd.studies.step_cost import (
    LLAMA_8B,
    LLAMA_70B,
    NAMES,
    QWEN_1_5B,
    QWEN_7B,
    SMOLLM,
    Chip,
    Plan,
    Work,
    best,
    schedule,
    stages,
)

H100 = Chip(
    "H100, bfloat16", products=775e12, memory=3.0e12, link=150e9, moved=1.6e9, driver=1e9, number=2,
    learn=0.4, read=0.6, write=0.6,
)  # fmt: skip
"""Measured on one card: products; learn; read, of a teacher of kind hf; moved, as far as the
learner's side goes (docs/benchmarks.md). Assumed: the rest."""
SMALL = Plan(
    "7B -> 1.5B, 8 H100", QWEN_1_5B, QWEN_7B, H100, Work(128, 4, 512, 320, 512),
    engines=1, scorers=3, ranks=4, recomputed=True,
)  # fmt: skip
LARGE = Plan(
    "70B -> 8B, 64 H100", LLAMA_8B, LLAMA_70B, H100, Work(256, 8, 1024, 640, 1024),
    engines=8, scorers=32, ranks=24, teacher_chips=4, recomputed=True,
)  # fmt: skip


def main() -> None:
    """Print both plans with the split of chips that is best for them; or what this processor could
    do at best."""
    parser = argparse.ArgumentParser(description="What a step would cost, by arithmetic.")
    parser.add_argument(
        "--here",
        action="store_true",
        help="the step of configs/benchmark.yaml on this machine's processor, if everything ran at "
        "the speed of a large product and of a large copy, which are measured first",
    )
    if parser.parse_args().here:
        chip = here()
        print(f"{chip.products / 1e9:.0f} GFLOP/s, {chip.memory / 1e9:.1f} GB/s")
        show(Plan("as it is", SHORT, SMOLLM, chip, WORK, engines=1, scorers=1, ranks=1))
        work = replace(WORK, prompts=2 * WORK.prompts)
        show(Plan("twice the prompts", SHORT, SMOLLM, chip, work, engines=1, scorers=1, ranks=1))
        return
    for plan in (best(SMALL, 8), best(LARGE, 64, least_ranks=8)):
        show(plan)


SHORT = replace(SMOLLM, name="its first 10 layers", layers=10)
WORK = Work(prompts=16, samples=1, prompt=28, completion=64, limit=64)
"""Of configs/benchmark.yaml."""


def here() -> Chip:
    """This processor, in float32, everything at the speed of the two operations measured."""
    import torch

    from actors.cpu_matmul import use_onednn

    use_onednn()  # as the learner does
    square, block = torch.randn(2048, 2048), torch.ones(2**26)

    def seconds(work: Callable[[], Any]) -> float:
        taken = []
        for _ in range(7):
            begun = time.perf_counter()
            work()
            taken.append(time.perf_counter() - begun)
        return median(taken)

    other = torch.empty_like(block)
    memory = 2 * block.nbytes / seconds(lambda: other.copy_(block))
    return Chip(
        "this processor, float32", products=2 * 2048**3 / seconds(lambda: square @ square),
        memory=memory, link=memory, moved=memory, driver=memory, number=4, learn=1.0, read=1.0,
        write=1.0,
    )  # fmt: skip


def show(plan: Plan) -> None:
    """Stages, their largest terms, and schedules."""
    of = stages(plan)
    print(
        f"\n{plan.name}: {plan.engines} sample, {plan.scorers} score, {plan.ranks} learn; "
        f"{plan.work.sequences} completions of {plan.work.completion:g} tokens, cut at "
        f"{plan.work.limit}"
    )
    for stage in NAMES:
        terms = ", ".join(f"{name} {s:.2f}" for name, s in getattr(of, stage).items())
        print(f"  {stage:<8}{of.seconds(stage):7.2f} s  {terms}")
    laid = schedule(plan)
    print(
        f"  a step: in turns {laid.turns:.1f} s; scoring beside sampling {laid.beside:.1f} s "
        f"(hides {laid.overlapped:.0%} of it); both beside learning {laid.ahead:.1f} s"
    )


if __name__ == "__main__":
    main()
