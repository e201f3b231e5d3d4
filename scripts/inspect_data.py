"""What the student will see, token by token: python scripts/inspect_data.py CONFIG [key=value ...]

Prompt tokens are dim, tokens that carry loss green; `│` stands between tokens, `↵` for a line
feed, `×2` after a character of two tokens. Without colour each token that carries loss is in
[brackets].
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from train import quiet

from seqkd.config import run as configuration
from seqkd.config.run import Config
from seqkd.config.samplers import SAMPLERS
from seqkd.console import run_command
from seqkd.data.dataset import DataSets, read_data
from seqkd.data.prompt_table import PromptTable
from seqkd.errors import DataError
from seqkd.models.loading import end_of_sequence_ids, load_config, load_tokenizer
from seqkd.types import Prompt

DIM, GREEN, BOLD, RESET = "\033[2m", "\033[32m", "\033[1m", "\033[0m"


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 shown, 2 a message says what to mend."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="YAML file (see configs/)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. data.turns=last")
    parser.add_argument("-n", type=positive, default=3, help="examples of each sampler (3)")
    parser.add_argument("--row", type=positive, default=1, help="the first prompt shown, from 1")
    args = parser.parse_intermixed_args(argv)
    return run_command(
        lambda: show(configuration.load(args.config, args.overrides), args.row - 1, args.n)
    )


def show(config: Config, first: int, number: int) -> int:
    """Print the header and ``number`` prompts from ``first`` on."""
    quiet()
    model = config.student.model
    load_config(model, "student.model")
    tokenizer = load_tokenizer(model, "student.model")
    stop_ids = end_of_sequence_ids(model, tokenizer, "student.model")
    found = read_data(config, tokenizer, stop_ids)
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for line in header(config, found):
        print(line)
    samplers = (term.sampler for _, phase in config.phases for term in phase.terms)
    for sampler in dict.fromkeys(map(config.source, samplers)):
        rows = found.corpus if SAMPLERS[sampler].plain_text else found.train
        if first >= len(rows):
            raise DataError(f"--row: {first + 1}: there are {len(rows)} prompts.")
        for index in range(first, min(first + number, len(rows))):
            prompt = rows[index]
            tag = f", tag {prompt.tag!r}" if prompt.tag else ""
            print(f"\nsampler {sampler}: prompt {index + 1} of {len(rows)}{tag}")
            print(example(prompt, sampler, config, tokenizer, colour))
    return 0


def positive(text: str) -> int:
    """A whole number from 1."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def header(config: Config, found: DataSets) -> Iterator[str]:
    """Sources, formats, counts, and how long the prompts and the answers are."""
    yield from map(str, found.summaries)
    yield f"data.turns: {config.data.turns}"
    for name, table in (("prompt", found.train), ("heldout", found.heldout)):
        if isinstance(table, PromptTable):
            yield from lengths(f"{name} tokens", table.lengths("token_ids"))
            yield from lengths("answer tokens", table.lengths("reference_ids"))
    if isinstance(found.corpus, PromptTable):
        yield from lengths("corpus tokens", found.corpus.lengths("reference_ids") + 1)
    for warning in found.warnings:
        yield f"warning: {warning}"


def lengths(name: str, values: np.ndarray) -> Iterator[str]:
    """A line of percentiles, where there is anything to measure."""
    if len(values):
        figures = zip(("50 %", "90 %", "99 %", "max"), (50, 90, 99, 100), strict=True)
        parts = (f"{label} {np.percentile(values, q):.0f}" for label, q in figures)
        yield f"{name + ':':16}{'   '.join(parts)}"


def example(prompt: Prompt, sampler: str, config: Config, tokenizer: Any, colour: bool) -> str:
    """The prompt's tokens, then what carries loss: the answer, or the place of a completion."""
    text = shown(prompt.token_ids, (), tokenizer, DIM, colour)
    if SAMPLERS[sampler].from_data:
        assert prompt.reference_ids is not None
        text += shown(prompt.reference_ids, prompt.token_ids, tokenizer, GREEN, colour)
        return text + (" (cut: no end of sequence)" if prompt.reference_cut else "")
    writer = "student or teacher" if SAMPLERS[sampler].weighted else sampler
    place = f"<- the {writer} writes here, at most {config.rollout.max_tokens} tokens"
    return text + (f"{GREEN}{BOLD}{place}{RESET}" if colour else f"[{place}]")


def shown(
    ids: Sequence[int], before: Sequence[int], tokenizer: Any, style: str, colour: bool
) -> str:
    """Tokens as text, with the marks that this file's docstring explains."""
    special = set(tokenizer.all_special_ids)
    cells = []
    for cell, text in pieces(ids, before, tokenizer):
        line, feed = text.replace("\n", "↵\n"), ""
        if line.endswith("\n"):  # what ends a token stands before the end of the line
            line, feed = line[:-1], "\n"
        line += f"×{len(cell)}" if len(cell) > 1 else ""
        if colour:
            bold = BOLD if cell[0] in special else ""
            cells.append(f"{style}{bold}{line}{RESET}{DIM}│{RESET}{feed}")
        else:
            cells.append(f"[{line}]{feed}" if style == GREEN else f"{line}│{feed}")
    return "".join(cells)


def pieces(
    ids: Sequence[int], before: Sequence[int], tokenizer: Any
) -> Iterator[tuple[list[int], str]]:
    """Tokens with their text; those that share a character come together."""

    def decode(some: list[int]) -> str:
        text: str = tokenizer.decode(some, clean_up_tokenization_spaces=False)
        return text

    # Decoded after what stands before: some tokenizers drop a sequence's first space.
    previous, cell = list(before[-1:]), list[int]()
    for number, token in enumerate(ids, 1):
        cell.append(token)
        text = decode(previous + cell)[len(decode(previous)) if previous else 0 :]
        if not text.endswith("\ufffd") or number == len(ids):
            yield cell, text
            previous, cell = cell, []


if __name__ == "__main__":
    sys.exit(main())
