"""Estimate the cost of a step on other machines by arithmetic: python scripts/scaling.py

docs/scaling.md describes the model and compares it with measurements.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from statistics import median
from timeit import repeat
from typing import Any

from seqkd.cli.arguments import Parser
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
"""Chip with values measured on one GPU (docs/benchmarks.md): products, learn, read (a teacher of
kind hf), and moved (the learner's side). All other values are assumptions."""
SMALL = Plan(
    "7B -> 1.5B, 8 H100", QWEN_1_5B, QWEN_7B, H100, Work(128, 4, 512, 320, 512),
    engines=1, scorers=3, ranks=4, recomputed=True,
)  # fmt: skip
LARGE = Plan(
    "70B -> 8B, 64 H100", LLAMA_8B, LLAMA_70B, H100, Work(256, 8, 1024, 640, 1024),
    engines=8, scorers=32, ranks=24, teacher_chips=4, recomputed=True,
)  # fmt: skip


def main() -> None:
    """Print both plans with their best splits of chips, or the lower bound for this processor."""
    parser = Parser(description="Estimate the cost of a step by arithmetic.")
    parser.add_argument(
        "--here",
        action="store_true",
        help="estimate the step of configs/benchmark.yaml on this processor, as if everything ran "
        "at the speed of a large product and a large copy, which are measured first",
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
"""Work of a step of configs/benchmark.yaml."""


def here() -> Chip:
    """Measure this processor in float32 by the speed of two large operations."""
    import torch

    from actors.cpu_matmul import use_onednn

    use_onednn()  # as the learner does
    square, block = torch.randn(2048, 2048), torch.ones(2**26)

    def seconds(work: Callable[[], Any]) -> float:
        return median(repeat(work, number=1, repeat=7))

    other = torch.empty_like(block)
    memory = 2 * block.nbytes / seconds(lambda: other.copy_(block))
    return Chip(
        "this processor, float32", products=2 * 2048**3 / seconds(lambda: square @ square),
        memory=memory, link=memory, moved=memory, driver=memory, number=4, learn=1.0, read=1.0,
        write=1.0,
    )  # fmt: skip


def show(plan: Plan) -> None:
    """Print the stages, their terms, and the schedules."""
    costs = stages(plan)
    print(
        f"\n{plan.name}: {plan.engines} sample, {plan.scorers} score, {plan.ranks} learn; "
        f"{plan.work.sequences} completions of {plan.work.completion:g} tokens, cut at "
        f"{plan.work.limit}"
    )
    for stage in NAMES:
        terms = ", ".join(f"{name} {s:.2f}" for name, s in getattr(costs, stage).items())
        print(f"  {stage:<8}{costs.seconds(stage):7.2f} s  {terms}")
    steps = schedule(plan)
    print(
        f"  a step: sequential {steps.sequential:.1f} s; scoring in parallel with sampling "
        f"{steps.split:.1f} s (hides {steps.hidden:.0%} of it); both in parallel with learning "
        f"{steps.prefetched:.1f} s"
    )


if __name__ == "__main__":
    main()
