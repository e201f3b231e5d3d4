"""What a step would cost on other machines, by arithmetic: python scripts/scaling.py

docs/scaling.md says what is counted and how it compares with what was measured.
"""

from __future__ import annotations

from seqkd.studies.step_cost import (
    LLAMA_8B,
    LLAMA_70B,
    NAMES,
    QWEN_1_5B,
    QWEN_7B,
    Chip,
    Plan,
    Work,
    best,
    schedule,
    stages,
)

H100 = Chip(
    "H100, bfloat16", products=775e12, memory=3.0e12, link=150e9, moved=5e9, driver=1e9, number=2,
    learn=0.44, read=0.5, write=0.6,
)  # fmt: skip
"""Measured on one card: products, learn (docs/benchmarks.md), memory. Assumed: the rest."""
SMALL = Plan(
    "7B -> 1.5B, 8 H100", QWEN_1_5B, QWEN_7B, H100, Work(128, 4, 512, 320, 512),
    engines=1, scorers=3, ranks=4, recomputed=True,
)  # fmt: skip
LARGE = Plan(
    "70B -> 8B, 64 H100", LLAMA_8B, LLAMA_70B, H100, Work(256, 8, 1024, 640, 1024),
    engines=8, scorers=32, ranks=24, teacher_chips=4, recomputed=True,
)  # fmt: skip


def main() -> None:
    """Print both plans with the split of chips that is best for them."""
    for plan in (best(SMALL, 8), best(LARGE, 64, least_ranks=8)):
        show(plan)


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
