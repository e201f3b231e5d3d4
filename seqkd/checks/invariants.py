"""Invariants of every batch: what was sampled, trained on and counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from seqkd.errors import LearningFault
from seqkd.protocols import Part
from seqkd.types import PartResult, Prompt, Rollout


def check_sampled(
    engine: str, prompts: Sequence[Prompt], numbers: Sequence[int], rollouts: Sequence[Rollout]
) -> None:
    """LearningFault unless ``rollouts`` are ``numbers[i]`` completions of prompt i, prompt by
    prompt, each with a sample id of its own."""
    asked = [p.token_ids for p, n in zip(prompts, numbers, strict=True) for _ in range(n)]
    if [r.prompt_ids for r in rollouts] != asked:
        problem = (
            f"{len(rollouts)} completions where {len(asked)} were asked for"
            if len(rollouts) != len(asked)
            else f"{len(rollouts)} completions that are not of the prompts in their order"
        )
        raise LearningFault(
            f"{engine}: gave {problem}. A completion is lost or doubled, and the rest would be "
            "trained as answers to other prompts. Go on from the last checkpoint; see the engine's "
            "log with --verbose."
        )
    (repeated, times), *_ = Counter(r.sample_id for r in rollouts).most_common(1) or [("", 1)]
    if times > 1:
        raise LearningFault(
            f"{engine}: gave the completion {repeated} {times} times. A doubled sample stands for "
            "another that is lost, and weighs twice. Go on from the last checkpoint; see the "
            "engine's log with --verbose."
        )


def check_trained(rollouts: Sequence[Rollout], trained: Sequence[str]) -> None:
    """LearningFault unless ``trained`` are the sample ids of ``rollouts``, each as often."""
    asked, got = Counter(r.sample_id for r in rollouts), Counter(trained)
    lost, added = asked - got, got - asked
    if lost or added:
        raise LearningFault(
            f"learner: of {len(rollouts)} completions {lost.total()} were not trained on"
            + (f" ({next(iter(lost))})" if lost else "")
            + f", and {added.total()} were that do not belong to the step"
            + (f" ({next(iter(added))})" if added else "")
            + ". The ranks did not get what was dealt to them. Go on from the last checkpoint."
        )


def check_counts(part: Part, learnt: PartResult) -> None:
    """LearningFault unless the learner saw as many sequences and tokens as the loss divides by."""
    for name in ("sequences", "tokens"):
        seen, counted = learnt.sums[name], getattr(part.counts, name)
        if seen != counted:
            raise LearningFault(
                f"learner: the loss was divided by {counted:g} {name}, but the ranks saw "
                f"{seen:g}: the gradient is off by that factor. Completions were lost or doubled "
                "between the driver and the ranks. Go on from the last checkpoint."
            )
