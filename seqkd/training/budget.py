"""Cost of training, and the number of steps that a budget allows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from seqkd.config.base import BudgetKind
from seqkd.config.phases import PhaseConfig
from seqkd.config.run import Config
from seqkd.protocols import Part
from seqkd.types import Rollout

Cost = dict[BudgetKind, float]
Spent = dict[str, Cost]
"""Costs by phase."""


def cost(phase: PhaseConfig, parts: Sequence[Part], seconds: float) -> Cost:
    """Return the cost of one step of ``phase`` that took ``seconds``. Cached completions and scores
    are charged as if they had been computed now. Completions that are masked out of the loss count
    as sampled."""
    drawn = [(part, r) for part in parts for r in (*part.rollouts, *part.masked)]
    return {
        "prompts": phase.prompts_per_step * len(parts),
        "sampled_tokens": _tokens(r for _, r in drawn if r.source in ("student", "teacher")),
        "learner_tokens": _tokens(r for part in parts for r in part.rollouts),
        "teacher_tokens": _tokens(r for _, r in drawn if r.source == "teacher")
        + _tokens(r for part, r in drawn if part.scores),
        "seconds": seconds,
    }


def spend(spent: Spent, name: str, costs: Cost) -> None:
    """Add the costs of a step of the phase ``name``."""
    before = spent.get(name, {})
    spent[name] = {kind: before.get(kind, 0.0) + costs[kind] for kind in costs}


def expected_steps(config: Config, phase: PhaseConfig, taken: int, spent: Spent) -> int:
    """Estimate the number of steps of ``phase`` from the cost of the ``taken`` steps so far.

    Returns ``taken`` if the phase ends now. Only the main phase has a budget, from which the cost
    of the warm-up is deducted.
    """
    budget = config.budget
    if budget is None or phase is not config:
        return phase.steps
    here = spent.get("main", {}).get(budget.kind, 0.0)
    before = sum(costs.get(budget.kind, 0.0) for costs in spent.values()) - here
    left = budget.amount - before - here
    if left <= 0:
        return taken
    if here == 0:
        return phase.steps
    return min(phase.steps, max(taken + 1, round(taken * (here + left) / here)))


def _tokens(rollouts: Iterable[Rollout]) -> int:
    return sum(len(r.completion_ids) for r in rollouts)
