"""Completions side by side; the background color of each token shows its divergence."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from seqkd.evaluation.summary import Completions, Token
from seqkd.storage.run_reader import Run

BOUNDS = (0.1, 0.5, 1.0, 2.0, 4.0)
"""Lower bounds of the colors, nats."""

Shown = dict[str, tuple[str, list[Token]]]
"""Text and tokens of each completion by author; no tokens if the divergences are unknown."""


def side_by_side(runs: Mapping[str, Run]) -> list[tuple[str, Shown]]:
    """Return the held-out prompts of the first run that has any, with completions.

    With a single run, these are all its completions. With several runs, these are the completions
    of the first run's teacher and of each run's final student, by the name of the run.
    """
    by_run = {name: run.evaluation.examples for name, run in runs.items() if run.evaluation}
    prompts = next(filter(None, by_run.values()), [])
    if len(runs) == 1:
        return [(e.prompt, {who: _shown(e, who) for who in e.completions}) for e in prompts]
    return [
        (
            prompt.prompt,
            {"teacher": _shown(prompt, "teacher")}
            | {
                name: _shown(example, "student after")
                for name, examples in by_run.items()
                for example in examples
                if example.prompt == prompt.prompt and "student after" in example.completions
            },
        )
        for prompt in prompts
    ]


def _shown(example: Completions, who: str) -> tuple[str, list[Token]]:
    return example.completions[who], example.tokens.get(who, [])


def level(kl: float | None) -> str:
    """Return the style class of a divergence in nats; empty if it is unknown."""
    return "" if kl is None else f"kl-{sum(kl >= bound for bound in BOUNDS)}"


def legend() -> list[tuple[str, str]]:
    """Return style classes and their ranges in nats, ascending."""
    ranges = [f"{low:g} to {high:g}" for low, high in pairwise(BOUNDS)]
    texts = (f"below {BOUNDS[0]:g}", *ranges, f"{BOUNDS[-1]:g} and above")
    return [(f"kl-{number}", text) for number, text in enumerate(texts)]


def visible(token: str) -> str:
    """Return a token with marks for line breaks and for parts of a multi-token character."""
    return token.replace("\n", "↵\n") or "·"
