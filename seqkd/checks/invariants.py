"""Invariants of every batch: sampled completions, trained completions, counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from seqkd.errors import LearningFault
from seqkd.protocols import Part
from seqkd.types import PartResult, Prompt, Rollout


def check_sampled(
    engine: str, prompts: Sequence[Prompt], numbers: Sequence[int], rollouts: Sequence[Rollout]
) -> None:
    """Raise LearningFault unless ``rollouts`` contains ``numbers[i]`` completions of each prompt i,
    in the order of the prompts and with unique sample ids."""
    asked = [p.token_ids for p, n in zip(prompts, numbers, strict=True) for _ in range(n)]
    if [r.prompt_ids for r in rollouts] != asked:
        problem = (
            f"{len(rollouts)} completions instead of {len(asked)}"
            if len(rollouts) != len(asked)
            else f"{len(rollouts)} completions that do not match the prompts in order"
        )
        raise LearningFault(
            f"{engine}: returned {problem}. A completion was lost or duplicated, so others would "
            "be trained on as answers to the wrong prompts. Resume from the last checkpoint, with "
            "--verbose to see the engine's log."
        )
    (repeated, times), *_ = Counter(r.sample_id for r in rollouts).most_common(1) or [("", 1)]
    if times > 1:
        raise LearningFault(
            f"{engine}: returned the completion {repeated} {times} times. A duplicate counts twice "
            "and replaces another completion. Resume from the last checkpoint, with --verbose to "
            "see the engine's log."
        )


def check_trained(rollouts: Sequence[Rollout], trained: Sequence[str]) -> None:
    """Raise LearningFault unless ``trained`` contains exactly the sample ids of ``rollouts``, each
    as often as there."""
    asked, got = Counter(r.sample_id for r in rollouts), Counter(trained)
    lost, added = asked - got, got - asked
    if lost or added:
        raise LearningFault(
            f"learner: {lost.total()} of {len(rollouts)} completions were not trained on"
            + (f" ({next(iter(lost))})" if lost else "")
            + f", and {added.total()} were trained on that do not belong to the step"
            + (f" ({next(iter(added))})" if added else "")
            + ". The ranks did not receive their share of the batch. Resume from the last "
            "checkpoint."
        )


def check_counts(part: Part, result: PartResult) -> None:
    """Raise LearningFault unless the learner saw as many sequences and tokens as the loss was
    divided by."""
    for name in ("sequences", "tokens"):
        seen, counted = result.sums[name], getattr(part.counts, name)
        if seen != counted:
            raise LearningFault(
                f"learner: the loss was divided by {counted:g} {name}, but the ranks saw "
                f"{seen:g}, so the gradient is wrong by that factor. Completions were lost or "
                "duplicated between the driver and the ranks. Resume from the last checkpoint."
            )
