"""Configuration of the data."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from seqkd.config.base import BaseConfig


class DataConfig(BaseConfig):
    """Prompts with or without answers, held-out prompts, and plain text."""

    path: str
    """Path of the data: a .jsonl, .json, .parquet or .arrow file, a glob of such files, a directory
    that `datasets` reads, or the name of a data set on the hub."""
    subset: str | None = None
    """Subset of a data set that has more than one."""
    split: str = "train"
    """Split of a directory or of a data set on the hub."""
    heldout_path: str | None = None
    """Path of the held-out prompts, like path. If unset: the same data set."""
    heldout_split: str | None = None
    """Split with the held-out prompts."""
    heldout_fraction: float | None = Field(None, gt=0, lt=1)
    """Share of the conversations that is held out, chosen by a hash of the first user message. It
    replaces heldout_path and heldout_split."""
    rows: int | None = Field(None, ge=1)
    """Largest number of rows to read from each source."""
    streaming: bool = False
    """Streaming: only those rows are downloaded from the hub."""
    format: Literal["auto", "messages", "instruction", "prompt"] = "auto"
    """Format of the rows. messages: a list of {role, content}; instruction: with input or context,
    as Alpaca and Dolly; prompt: one column; auto: detected from the columns."""
    messages_key: str = "messages"
    """Column with the messages of format messages."""
    prompt_key: str = "prompt"
    """Column with the prompt of format prompt."""
    reference_key: str | None = None
    """Column with the answers for sampler dataset. If unset: reference, completion, response,
    output or answer."""
    tag_key: str | None = None
    """Column with a text that prompts carry as their tag."""
    turns: Literal["all", "first", "last"] = "all"
    """Turns of a conversation that become prompts."""
    chat: bool = True
    """Rendering of prompts with the student's chat template."""
    thinking: bool | None = None
    """Value of the chat template's enable_thinking. If unset: the template's default."""
    system: str | None = None
    """System message of every conversation that has none of its own."""
    max_prompt_tokens: int = Field(512, ge=1)
    """Largest number of tokens of a prompt."""
    too_long: Literal["drop", "truncate"] = "drop"
    """Treatment of texts that are too long. drop: prompts and answers are dropped; truncate:
    prompts lose their oldest exchanges (plain text its first tokens), answers lose their end."""
    corpus_path: str | None = None
    """Path of the plain text for sampler corpus, like path."""
    corpus_subset: str | None = None
    """Subset of a corpus that has more than one."""
    corpus_split: str = "train"
    """Split of a directory or of a data set on the hub."""
    text_key: str = "text"
    """Column with the text of the corpus."""
    corpus_tokens: int = Field(512, ge=2)
    """Number of tokens of the pieces that longer texts are cut into."""

    @property
    def holds_out(self) -> bool:
        """True if prompts are held out."""
        return bool(self.heldout_path or self.heldout_split or self.heldout_fraction)

    @model_validator(mode="after")
    def _one_way_to_hold_out(self) -> DataConfig:
        for key in ("heldout_path", "heldout_split"):
            if self.heldout_fraction and getattr(self, key) is not None:
                raise ValueError(
                    f"{key} {getattr(self, key)!r} and heldout_fraction {self.heldout_fraction:g} "
                    "both determine which prompts are held out. Set one of them."
                )
        if self.heldout_split == self.split and self.heldout_path in (None, self.path):
            raise ValueError(
                f"heldout_split {self.heldout_split!r} is the split that is trained on. Name "
                "another split, or set heldout_fraction in its place."
            )
        return self

    @model_validator(mode="after")
    def _options_fit(self) -> DataConfig:
        if self.streaming and self.rows is None:
            raise ValueError(
                "streaming fetches the first rows of a data set, but rows is not set. Set rows to "
                "their number, or streaming to false to fetch all of them."
            )
        if self.thinking is not None and not self.chat:
            raise ValueError(
                f"thinking {self.thinking} is an option of the chat template, but chat is false. "
                "Unset one of the two."
            )
        return self
