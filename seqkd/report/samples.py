"""Completions side by side, each token on a background that deepens with its divergence."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from seqkd.evaluation.summary import Completions, Token
from seqkd.report.wording import printable
from seqkd.storage.run_reader import Run

BOUNDS = (0.1, 0.5, 1.0, 2.0, 4.0)
"""Nats at which the next deeper color begins."""

Shown = dict[str, tuple[str, list[Token]]]
"""Text and tokens of each completion by its author; no tokens where divergences are not known."""


def side_by_side(runs: Mapping[str, Run]) -> list[tuple[str, Shown]]:
    """Return each held-out prompt of the first run that has any, with its completions.

    A single run shows all its completions; several runs show the teacher's (of the first run) and
    each final student's, by the name of the run.
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
    """Return the style class of a divergence in nats; empty where it is not known."""
    return "" if kl is None else f"kl-{sum(kl >= bound for bound in BOUNDS)}"


def legend() -> list[tuple[str, str]]:
    """Return style classes and their ranges in nats, ascending."""
    ranges = [f"{low:g} to {high:g}" for low, high in pairwise(BOUNDS)]
    texts = (f"below {BOUNDS[0]:g}", *ranges, f"{BOUNDS[-1]:g} and above")
    return [(f"kl-{number}", text) for number, text in enumerate(texts)]


def visible(token: str) -> str:
    """Return a token with marks for line ends and for parts of a multi-token character."""
    return printable(token).replace("\n", "↵\n") or "·"
