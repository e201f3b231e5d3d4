"""Completions side by side, each token on a background that deepens with its divergence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from seqkd.evaluation.summary import Completions, Token
from seqkd.report.wording import printable
from seqkd.storage.run_reader import Run

BOUNDS = (0.1, 0.5, 1.0, 2.0, 4.0)
"""Nats at which the next deeper colour begins."""
HIGHEST = 3
"""Tokens named below a completion."""


@dataclass(frozen=True)
class ShownCompletion:
    """One completion."""

    who: str
    tokens: list[tuple[str, str, str]]
    """Text, class of the style sheet and what is said on hovering; empty where no divergence is
    known."""
    text: str
    highest: str
    """Its tokens of the greatest divergence, in words."""


@dataclass(frozen=True)
class Compared:
    """The completions of one prompt."""

    prompt: str
    completions: list[ShownCompletion]


def legend() -> list[tuple[str, str]]:
    """Class of the style sheet and its range in nats, from low to high."""
    ranges = [f"{low:g} to {high:g}" for low, high in pairwise(BOUNDS)]
    return [
        (f"kl-{level}", text)
        for level, text in enumerate((f"below {BOUNDS[0]:g}", *ranges, f"{BOUNDS[-1]:g} and above"))
    ]


def coloured(runs: Sequence[Run]) -> bool:
    """Whether the divergence of any token is known."""
    return any(e.tokens for run in runs if run.evaluation for e in run.evaluation.examples)


def side_by_side(runs: Sequence[Run]) -> list[Compared]:
    """Of one run its completions as they are; of several those of the teacher as the first run has
    them, then each student at its end. Prompts of the first run that has any."""
    if len(runs) > 1:
        return across({f"student of {run.name}": run for run in runs})
    found = runs[0].evaluation.examples if runs[0].evaluation else []
    return [_compared(e, {who: (e, who) for who in e.completions}) for e in found]


def across(runs: Mapping[str, Run]) -> list[Compared]:
    """What the teacher wrote, as the first run has it, then each student at its end, by name."""
    known = {name: of.examples for name, run in runs.items() if (of := run.evaluation)}
    first = next(filter(None, known.values()), [])
    return [_across(example, known) for example in first]


def _across(example: Completions, known: Mapping[str, Sequence[Completions]]) -> Compared:
    columns = {"teacher": (example, "teacher")}
    for name, examples in known.items():
        for other in examples:
            if other.prompt == example.prompt:
                columns[name] = (other, "student after")
    return _compared(example, columns)


def _compared(example: Completions, columns: dict[str, tuple[Completions, str]]) -> Compared:
    shown = [
        completion(name, of.completions[who], of.tokens.get(who, []))
        for name, (of, who) in columns.items()
        if who in of.completions
    ]
    return Compared(printable(example.prompt), shown)


def completion(who: str, text: str, tokens: Sequence[Token]) -> ShownCompletion:
    """What is shown of one."""
    known = sorted(((kl, t) for t, kl in tokens if kl is not None), reverse=True)[:HIGHEST]
    return ShownCompletion(
        who,
        [(_visible(t), _level(kl), _said(kl)) for t, kl in tokens],
        printable(text),
        ", ".join(f"“{_visible(t).strip() or t}” {kl:.2f}" for kl, t in known),
    )


def _level(kl: float | None) -> str:
    return "" if kl is None else f"kl-{sum(kl >= bound for bound in BOUNDS)}"


def _said(kl: float | None) -> str:
    return "not known" if kl is None else f"{kl:.3f} nats"


def _visible(text: str) -> str:
    """A token that ends a line, or is part of a character that a later one completes, can be seen
    too."""
    return printable(text).replace("\n", "↵\n") or "·"
