"""Configuration of the data."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from seqkd.config.base import BaseConfig


class DataConfig(BaseConfig):
    """Data: prompts with or without answers, held-out prompts, and plain text."""

    path: str
    """Path of the data: a .jsonl, .json, .parquet or .arrow file, a glob of such files, a directory
    that `datasets` can read, or the name of a data set on the Hugging Face hub."""
    subset: str | None = None
    """Subset (configuration name) of the data set, if it has several."""
    split: str = "train"
    """Split of a directory or of a data set on the hub."""
    heldout_path: str | None = None
    """Path of the held-out prompts, in the same forms as path. If unset: the same data set."""
    heldout_split: str | None = None
    """Split with the held-out prompts. If unset: train, with heldout_path."""
    heldout_fraction: float | None = Field(None, gt=0, lt=1)
    """Share of the conversations to hold out, selected by a hash of the first user message. Use it
    instead of heldout_path and heldout_split."""
    rows: int | None = Field(None, ge=1)
    """Maximum number of rows to read from each source. If unset: all rows."""
    streaming: bool = False
    """Streaming from the hub, which downloads only the first `rows` rows."""
    format: Literal["auto", "messages", "instruction", "prompt"] = "auto"
    """Format of the rows. messages: a list of {role, content}; instruction: an instruction with
    optional input or context, as in Alpaca and Dolly; prompt: one column; auto: detected from the
    columns."""
    messages_key: str = "messages"
    """Column with the messages for format messages."""
    prompt_key: str = "prompt"
    """Column with the prompt for format prompt."""
    reference_key: str | None = None
    """Column with the answers for sampler dataset. If unset: reference, completion, response,
    output or answer."""
    tag_key: str | None = None
    """Column with the tag of each prompt, a text that selects among several teachers."""
    turns: Literal["all", "first", "last"] = "all"
    """Turns of a conversation that become prompts."""
    chat: bool = True
    """Rendering of prompts with the student's chat template. false: the messages are joined by
    blank lines."""
    thinking: bool | None = None
    """Value of the chat template's enable_thinking. If unset: the template's default."""
    content_tokens: tuple[str, ...] = ()
    """Tokens that the text of prompts and answers may contain as tokens, such as <think>. All other
    special tokens, and tokens of the chat template, are encoded as ordinary text."""
    system: str | None = None
    """System message for conversations that have none."""
    max_prompt_tokens: int = Field(512, ge=1)
    """Maximum number of tokens per prompt."""
    too_long: Literal["drop", "truncate"] = "drop"
    """Treatment of texts that are too long. drop: prompts and answers are dropped; truncate: the
    oldest exchanges of a prompt are removed (from a prompt without chat template its first tokens),
    and answers are cut at the end."""
    corpus_path: str | None = None
    """Path of the plain text for sampler corpus, in the same forms as path."""
    corpus_subset: str | None = None
    """Subset (configuration name) of the corpus, if it has several."""
    corpus_split: str = "train"
    """Split of the corpus, if it is a directory or a data set on the hub."""
    text_key: str = "text"
    """Column with the text of the corpus."""
    corpus_tokens: int = Field(512, ge=2)
    """Maximum number of tokens per piece of the corpus. Longer texts are cut into pieces."""

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
                    "both select the held-out prompts. Set only one of them."
                )
        if self.heldout_split == self.split and self.heldout_path in (None, self.path):
            raise ValueError(
                f"heldout_split {self.heldout_split!r} is also the training split. Set it to "
                "another split, or set heldout_fraction instead."
            )
        return self

    @model_validator(mode="after")
    def _options_fit(self) -> DataConfig:
        if self.streaming and self.rows is None:
            raise ValueError(
                "streaming is true, but rows is not set. Set rows to the number of rows to "
                "download, or streaming to false to download all of them."
            )
        if self.thinking is not None and not self.chat:
            raise ValueError(
                f"thinking is {str(self.thinking).lower()}, which is an option of the chat "
                "template, but chat is false. Remove thinking, or set chat to true."
            )
        return self
