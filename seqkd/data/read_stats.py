"""Numbers of rows that were read and dropped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from seqkd.config.data import DataConfig
from seqkd.data.formats import Format
from seqkd.data.readers import Source

T = TypeVar("T")


BATCH = 1000
"""Number of prompts that are tokenized at once. Fast tokenizers use all cores."""


@dataclass
class ReadStats:
    """Statistics of reading one source."""

    source: Source
    format: Format | None = None
    conversations: int = 0
    prompts: int = 0
    long_prompts: int = 0
    long_answers: int = 0
    truncated_prompts: int = 0
    cut_answers: int = 0
    unanswered: int = 0
    blank: int = 0
    duplicates: int = 0
    special: frozenset[str] = frozenset()
    """Special tokens whose text occurs in the texts."""
    mismatch: str | None = None
    """Warning that the chat template renders answers differently from the training text."""

    def __str__(self) -> str:
        form = f", format {self.format}" if self.format else ""
        unit = "conversations" if self.format else "texts"
        return (
            f"{self.source.field}: {self.source}{form}: {self.conversations} {unit}, "
            f"{self.prompts} {'prompts' if self.format else 'pieces'}"
        )

    def losses(self, data: DataConfig, longest: int) -> list[str]:
        """Return one line per kind of dropped or truncated text, with its count. ``longest`` is the
        maximum number of tokens of an answer."""
        lines = (
            (self.long_prompts, "prompts dropped: longer than data.max_prompt_tokens = "
             f"{data.max_prompt_tokens}"),
            (self.long_answers, "prompts dropped: their answers are longer than rollout.max_tokens "
             f"= {longest}"),
            (self.truncated_prompts, "prompts truncated at the start to data.max_prompt_tokens = "
             f"{data.max_prompt_tokens}"),
            (self.cut_answers, f"answers truncated to rollout.max_tokens = {longest}, without an "
             "end-of-sequence token"),
            (self.unanswered, "prompts dropped: they have no answer"),
            (self.blank, "texts dropped: they are blank"),
            (self.duplicates, "prompts dropped: duplicates of an earlier prompt and answer"),
        )  # fmt: skip
        printed = [f"{self.source.field}: {count} {what}." for count, what in lines if count]
        if self.special:
            printed.append(
                f"{self.source.field}: texts contain {' '.join(sorted(self.special))}, which is "
                "encoded as ordinary text. If it is meant as a token, add it to "
                "data.content_tokens."
            )
        return printed
