"""Print what the student sees, token by token.

Prompt tokens are dim and tokens that carry loss are green. `│` separates tokens, `↵` stands for a
line feed, and `×2` follows a character that is made of two tokens. Without color, tokens that
carry loss are in [brackets].
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from seqkd.cli.arguments import add_config
from seqkd.console import quiet, run_command
from seqkd.errors import DataError

if TYPE_CHECKING:
    import numpy as np

    from seqkd.config.run import Config
    from seqkd.config.samplers import SamplerName
    from seqkd.data.dataset import DataSets
    from seqkd.types import Prompt

DIM, GREEN, BOLD, RESET = "\033[2m", "\033[32m", "\033[1m", "\033[0m"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``seqkd inspect``."""
    parser.epilog = "Example: seqkd inspect configs/tiny.yaml sampler=dataset"
    add_config(parser, "YAML file (see configs/)", "data.turns=last")
    parser.add_argument("-n", type=positive, default=3, help="examples per sampler (3)")
    parser.add_argument("--row", type=positive, default=1, help="first prompt, from 1 (1)")


def run(args: argparse.Namespace) -> int:
    """Run ``seqkd inspect``."""

    def action() -> int:
        from seqkd.config.run import load

        return show(load(args.config, args.overrides), args.row - 1, args.n)

    return run_command(action)


def positive(text: str) -> int:
    """Parse an integer of at least 1."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def show(config: Config, first: int, number: int) -> int:
    """Print the header and ``number`` prompts, beginning with index ``first``."""
    quiet()
    from seqkd.config.samplers import SAMPLERS
    from seqkd.data.dataset import read_data
    from seqkd.models.loading import end_of_sequence_ids, load_config, load_tokenizer

    model = config.student.model
    load_config(model, "student.model")
    tokenizer = load_tokenizer(model, "student.model")
    stop_ids = end_of_sequence_ids(model, tokenizer, "student.model")
    data = read_data(config, tokenizer, stop_ids)
    color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for line in header(config, data):
        print(line)
    samplers = (term.sampler for _, phase in config.phases for term in phase.terms)
    for sampler in dict.fromkeys(map(config.source, samplers)):
        rows = data.corpus if SAMPLERS[sampler].plain_text else data.train
        if first >= len(rows):
            raise DataError(f"--row: {first + 1}: there are {len(rows)} prompts.")
        for index in range(first, min(first + number, len(rows))):
            prompt = rows[index]
            tag = f", tag {prompt.tag!r}" if prompt.tag else ""
            print(f"\nsampler {sampler}: prompt {index + 1} of {len(rows)}{tag}")
            print(example(prompt, sampler, config, tokenizer, color))
    return 0


def header(config: Config, data: DataSets) -> Iterator[str]:
    """Sources, formats, counts, and the lengths of prompts and answers, a line each."""
    from seqkd.data.prompt_table import PromptTable

    yield from map(str, data.summaries)
    yield f"data.turns: {config.data.turns}"
    for name, table in (("prompt", data.train), ("heldout", data.heldout)):
        if isinstance(table, PromptTable):
            yield from lengths(f"{name} tokens", table.lengths("token_ids"))
            yield from lengths("answer tokens", table.lengths("reference_ids"))
    if isinstance(data.corpus, PromptTable):
        yield from lengths("corpus tokens", data.corpus.lengths("reference_ids") + 1)
    for warning in data.warnings:
        yield f"warning: {warning}"


def lengths(name: str, values: np.ndarray) -> Iterator[str]:
    """A line of percentiles of ``values`` [N]; no line if N is 0."""
    import numpy as np

    if len(values):
        figures = zip(("50 %", "90 %", "99 %", "max"), (50, 90, 99, 100), strict=True)
        parts = (f"{label} {np.percentile(values, q):.0f}" for label, q in figures)
        yield f"{name + ':':16}{'   '.join(parts)}"


def example(
    prompt: Prompt, sampler: SamplerName, config: Config, tokenizer: Any, color: bool
) -> str:
    """Format the prompt's tokens, then the answer or the place of the completion."""
    from seqkd.config.samplers import SAMPLERS

    text = format_tokens(prompt.token_ids, (), tokenizer, DIM, color)
    if SAMPLERS[sampler].from_data:
        assert prompt.reference_ids is not None
        text += format_tokens(prompt.reference_ids, prompt.token_ids, tokenizer, GREEN, color)
        return text + (" (cut: no end of sequence)" if prompt.reference_cut else "")
    writer = "student or teacher" if SAMPLERS[sampler].weighted else sampler
    place = f"<- the {writer} writes here, at most {config.rollout.max_tokens} tokens"
    return text + (f"{GREEN}{BOLD}{place}{RESET}" if color else f"[{place}]")


def format_tokens(
    ids: Sequence[int], before: Sequence[int], tokenizer: Any, style: str, color: bool
) -> str:
    """Format tokens as text, with the marks that this module's docstring explains."""
    special = set(tokenizer.all_special_ids)
    cells = []
    for cell, text in pieces(ids, before, tokenizer):
        line, feed = text.replace("\n", "↵\n"), ""
        if line.endswith("\n"):  # the mark at the end of a token comes before the line feed
            line, feed = line[:-1], "\n"
        line += f"×{len(cell)}" if len(cell) > 1 else ""
        if color:
            bold = BOLD if cell[0] in special else ""
            cells.append(f"{style}{bold}{line}{RESET}{DIM}│{RESET}{feed}")
        else:
            cells.append(f"[{line}]{feed}" if style == GREEN else f"{line}│{feed}")
    return "".join(cells)


def pieces(
    ids: Sequence[int], before: Sequence[int], tokenizer: Any
) -> Iterator[tuple[list[int], str]]:
    """Yield tokens with their text; tokens that share a character are one piece."""

    def decode(tokens: list[int]) -> str:
        text: str = tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        return text

    # Decoded with its predecessor: some tokenizers drop a sequence's first space.
    previous, cell = list(before[-1:]), list[int]()
    for number, token in enumerate(ids, 1):
        cell.append(token)
        text = decode(previous + cell)[len(decode(previous)) if previous else 0 :]
        if not text.endswith("\ufffd") or number == len(ids):
            yield cell, text
            previous, cell = cell, []
