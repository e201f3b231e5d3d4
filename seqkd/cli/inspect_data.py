"""Print training prompts and answers, token by token.

Prompt tokens are dim and tokens that carry loss are green. `│` separates tokens, `↵` is a line
feed, and `×2` follows a character that consists of two tokens. Without color, tokens that carry
loss are in [brackets].
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from seqkd.cli.arguments import add_config, at_least_one
from seqkd.console import console, print_message, quiet, run_command, show
from seqkd.errors import DataError
from seqkd.escaping import printable

if TYPE_CHECKING:
    import numpy as np
    from rich.text import Text

    from seqkd.config.run import Config
    from seqkd.config.samplers import SamplerName
    from seqkd.data.dataset import DataSets
    from seqkd.types import Prompt

PICTURES = {code: 0x2400 + code for code in range(0x20) if code != 0x0A} | {0x7F: 0x2421}
"""Visible symbols of the control characters except line feed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``seqkd inspect``."""
    parser.epilog = "Example: seqkd inspect configs/tiny.yaml sampler=dataset"
    add_config(parser, "YAML file (see configs/)", "data.turns=last")
    parser.add_argument(
        "-n", type=at_least_one, default=3, help="number of prompts per sampler (3)"
    )
    parser.add_argument(
        "--row", type=at_least_one, default=1, help="first prompt, counted from 1 (1)"
    )


def run(args: argparse.Namespace) -> int:
    """Run ``seqkd inspect``."""

    def action() -> int:
        from seqkd.config.run import load

        return inspect(load(args.config, args.overrides), args.row - 1, args.n)

    return run_command(action)


def inspect(config: Config, first: int, number: int) -> int:
    """Print the header and ``number`` prompts, starting at index ``first``."""
    quiet()
    from seqkd.config.samplers import SAMPLERS
    from seqkd.data.dataset import read_data
    from seqkd.models.loading import end_of_sequence_ids, load_config, load_tokenizer

    model = config.student.model
    load_config(model, "student.model")
    tokenizer = load_tokenizer(model, "student.model")
    stop_ids = end_of_sequence_ids(model, tokenizer, "student.model")
    data = read_data(config, tokenizer, stop_ids)
    out = console(sys.stdout)
    color = out.color_system is not None and not out.no_color
    show(*header(config, data))
    for warning in data.warnings:
        print_message("warning", warning)
    samplers = (term.sampler for _, phase in config.phases for term in phase.terms)
    for sampler in dict.fromkeys(map(config.source, samplers)):
        rows = data.corpus if SAMPLERS[sampler].plain_text else data.train
        if first >= len(rows):
            raise DataError(
                f"--row: is {first + 1}, but there are {len(rows)} prompts. Set a smaller number."
            )
        for index in range(first, min(first + number, len(rows))):
            prompt = rows[index]
            tag = f", tag {prompt.tag!r}" if prompt.tag else ""
            show(f"\nsampler {sampler}: prompt {index + 1} of {len(rows)}{tag}")
            show(example(prompt, sampler, config, tokenizer, color))
    return 0


def header(config: Config, data: DataSets) -> Iterator[str]:
    """Yield one line per source, format and count, and per length of prompts and answers."""
    from seqkd.data.prompt_table import PromptTable

    yield from map(str, data.summaries)
    yield f"data.turns: {config.data.turns}"
    for name, table in (("prompt", data.train), ("heldout", data.heldout)):
        if isinstance(table, PromptTable):
            yield from lengths(f"{name} tokens", table.lengths("token_ids"))
            yield from lengths("answer tokens", table.lengths("reference_ids"))
    if isinstance(data.corpus, PromptTable):
        yield from lengths("corpus tokens", data.corpus.lengths("reference_ids") + 1)


def lengths(name: str, values: np.ndarray) -> Iterator[str]:
    """Yield one line with the percentiles of ``values`` [N], or no line if N is 0."""
    import numpy as np

    if len(values):
        figures = zip(("50 %", "90 %", "99 %", "max"), (50, 90, 99, 100), strict=True)
        parts = (f"{label} {np.percentile(values, q):.0f}" for label, q in figures)
        yield f"{name + ':':16}{'   '.join(parts)}"


def example(
    prompt: Prompt, sampler: SamplerName, config: Config, tokenizer: Any, color: bool
) -> Text:
    """Format the prompt's tokens, then the answer or a mark in place of the completion."""
    from seqkd.config.samplers import SAMPLERS

    text = format_tokens(prompt.token_ids, (), tokenizer, "dim", color)
    if SAMPLERS[sampler].from_data:
        assert prompt.reference_ids is not None
        text += format_tokens(prompt.reference_ids, prompt.token_ids, tokenizer, "green", color)
        return text.append(" (cut: no end of sequence)" if prompt.reference_cut else "")
    writer = "student or teacher" if SAMPLERS[sampler].weighted else sampler
    place = f"<- the {writer} writes here, at most {config.rollout.max_tokens} tokens"
    return text.append(place, "bold green") if color else text.append(f"[{place}]")


def format_tokens(
    ids: Sequence[int], before: Sequence[int], tokenizer: Any, style: str, color: bool
) -> Text:
    """Format tokens as text, with the marks that this module's docstring explains."""
    from rich.text import Text

    special = set(tokenizer.all_special_ids)
    shown = Text()
    for cell, text in pieces(ids, before, tokenizer):
        line, feed = printable(text.translate(PICTURES)).replace("\n", "↵\n"), ""
        if line.endswith("\n"):  # the mark at the end of a token comes before the line feed
            line, feed = line[:-1], "\n"
        line += f"×{len(cell)}" if len(cell) > 1 else ""
        if color:
            bold = "bold " if cell[0] in special else ""
            shown.append(line, bold + style).append("│", "dim").append(feed)
        else:
            shown.append(f"[{line}]{feed}" if style == "green" else f"{line}│{feed}")
    return shown


def pieces(
    ids: Sequence[int], before: Sequence[int], tokenizer: Any
) -> Iterator[tuple[list[int], str]]:
    """Yield tokens with their text. Tokens that share a character form one piece."""

    def decode(tokens: list[int]) -> str:
        text: str = tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        return text

    # Decoded with the previous token, because some tokenizers drop the first space of a sequence.
    previous, cell = list(before[-1:]), list[int]()
    for number, token in enumerate(ids, 1):
        cell.append(token)
        text = decode(previous + cell)[len(decode(previous)) if previous else 0 :]
        if not text.endswith("\ufffd") or number == len(ids):
            yield cell, text
            previous, cell = cell, []
