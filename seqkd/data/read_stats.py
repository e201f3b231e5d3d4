"""Counts of the rows that were read and dropped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from seqkd.config.data import DataConfig
from seqkd.data.formats import Format
from seqkd.data.readers import Source

T = TypeVar("T")


BATCH = 1000
"""Prompts tokenised at once; fast tokenizers use every core."""


@dataclass
class ReadStats:
    """What became of the rows of one source."""

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
    otherwise: str | None = None
    """How the chat template writes an answer, where that is not what is learnt."""

    def __str__(self) -> str:
        form = f", format {self.format}" if self.format else ""
        unit = "conversations" if self.format else "texts"
        return (
            f"{self.source.field}: {self.source}{form}: {self.conversations} {unit}, "
            f"{self.prompts} {'prompts' if self.format else 'pieces'}"
        )

    def losses(self, data: DataConfig, longest: int) -> list[str]:
        """What was left out or cut, a line each with its count; ``longest`` answers in tokens."""
        lines = (
            (self.long_prompts, f"prompts left out, longer than data.max_prompt_tokens = "
             f"{data.max_prompt_tokens}"),
            (self.long_answers, f"prompts left out, their answers longer than rollout.max_tokens = "
             f"{longest}"),
            (self.truncated_prompts, "prompts lost their oldest part to have data.max_prompt_tokens"
             f" = {data.max_prompt_tokens}"),
            (self.cut_answers, f"answers cut at rollout.max_tokens = {longest}, without an end of "
             "sequence"),
            (self.unanswered, "prompts left out that have no answer"),
            (self.blank, "texts left out that are blank"),
            (self.duplicates, "prompts left out that are the same as an earlier one, answer "
             "included"),
        )  # fmt: skip
        return [f"{self.source.field}: {count} {what}." for count, what in lines if count]
