"""The configuration of the data."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from seqkd.config.base import BaseConfig


class DataConfig(BaseConfig):
    """Prompts, with answers or without; held-out prompts; plain text."""

    path: str = Field(
        description="A .jsonl, .json, .parquet or .arrow file or a glob of them; a directory that "
        "`datasets` reads; else the name of a data set on the hub."
    )
    subset: str | None = Field(None, description="Of a data set that has several.")
    split: str = Field("train", description="Of a directory or a data set on the hub.")
    heldout_path: str | None = Field(None, description="As path; left out: the same data set.")
    heldout_split: str | None = Field(None, description="Split with the held-out prompts.")
    heldout_fraction: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Share of the conversations that is held out, by a hash of the first user "
        "message; in place of the two above.",
    )
    rows: int | None = Field(None, ge=1, description="Read at most so many rows of each source.")
    streaming: bool = Field(False, description="Fetch only those rows from the hub.")
    format: Literal["auto", "messages", "instruction", "prompt"] = Field(
        "auto",
        description="messages: a list of {role, content}; instruction: with input or context, as "
        "Alpaca and Dolly; prompt: one column. auto: by the columns.",
    )
    messages_key: str = Field("messages", description="The column of format messages.")
    prompt_key: str = Field("prompt", description="The column of format prompt.")
    reference_key: str | None = Field(
        None,
        description="Answers, for sampler=dataset; left out: reference, completion, response, "
        "output or answer.",
    )
    tag_key: str | None = Field(None, description="A column of text that prompts carry along.")
    turns: Literal["all", "first", "last"] = Field(
        "all", description="The turns of a conversation that become prompts."
    )
    chat: bool = Field(True, description="Render with the student's chat template.")
    thinking: bool | None = Field(
        None, description="enable_thinking of the chat template; left out: the template's default."
    )
    system: str | None = Field(
        None, description="System message of every conversation that has none of its own."
    )
    max_prompt_tokens: int = Field(512, ge=1, description="Longest prompt.")
    too_long: Literal["drop", "truncate"] = Field(
        "drop",
        description="drop: leave long prompts and answers out; truncate: prompts lose their oldest "
        "exchanges (plain text its first tokens), answers their end.",
    )
    corpus_path: str | None = Field(None, description="Plain text for sampler=corpus; as path.")
    corpus_subset: str | None = Field(None, description="Of a data set that has several.")
    corpus_split: str = Field("train", description="Of a directory or a data set on the hub.")
    text_key: str = Field("text", description="The column of the corpus.")
    corpus_tokens: int = Field(
        512, ge=2, description="Longer texts are cut into pieces of this many tokens."
    )

    @property
    def holds_out(self) -> bool:
        """Whether it says which prompts are held out."""
        return bool(self.heldout_path or self.heldout_split or self.heldout_fraction)

    @model_validator(mode="after")
    def _one_way_to_hold_out(self) -> DataConfig:
        for key in ("heldout_path", "heldout_split"):
            if self.heldout_fraction and getattr(self, key) is not None:
                raise ValueError(
                    f"{key} {getattr(self, key)!r} and heldout_fraction {self.heldout_fraction:g} "
                    "both say which prompts are held out. Set one of them."
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
                f"thinking {self.thinking} is a word to the chat template, but chat is false. "
                "Leave one of the two out."
            )
        return self
