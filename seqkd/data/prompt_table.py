"""Memory-efficient table of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from seqkd.data.formats import Message
from seqkd.types import Prompt

IDS, TEXT = pa.list_(pa.int32()), pa.string()
PROMPTS = pa.schema(
    [
        ("prompt_id", TEXT),
        ("token_ids", IDS),
        ("reference_ids", IDS),
        ("reference_cut", pa.bool_()),
        ("tag", TEXT),
        ("conversation", pa.int32()),
        ("start", pa.int32()),
        ("stop", pa.int32()),
    ]
)
CONVERSATION = pa.list_(pa.struct([("role", TEXT), ("content", TEXT)]))


class PromptTable(Sequence[Prompt]):
    """A sequence of prompts in Arrow tables. A :class:`Prompt` is built on access. The messages of
    a conversation are stored once, even if several of its turns are prompts."""

    def __init__(self, prompts: list[pa.RecordBatch], conversations: list[pa.Array]) -> None:
        self.columns = pa.Table.from_batches(prompts, PROMPTS)
        self.conversations = pa.chunked_array(conversations, CONVERSATION)

    def __len__(self) -> int:
        return int(self.columns.num_rows)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = {name: self.columns[name][index] for name in PROMPTS.names}
        messages: tuple[Message, ...] = ()
        if row["conversation"].is_valid:
            whole = self.conversations[row["conversation"].as_py()].as_py()
            pairs = tuple((m["role"], m["content"]) for m in whole)
            messages = part_of(pairs, row["start"].as_py(), row["stop"].as_py())
        return Prompt(
            prompt_id=row["prompt_id"].as_py(),
            token_ids=_ids(row["token_ids"]),
            text=next((text for role, text in reversed(messages) if role == "user"), ""),
            reference_ids=_ids(row["reference_ids"]) if row["reference_ids"].is_valid else None,
            messages=messages,
            reference_cut=row["reference_cut"].as_py(),
            tag=row["tag"].as_py(),
        )

    def tags(self) -> set[str]:
        """Return the tags of all prompts."""
        return set(self.columns["tag"].unique().to_pylist())

    def digest(self) -> str:
        """Return a hash of the training data: the identifier, answer and tag of every prompt, in
        order."""
        whole = xxhash.xxh3_128()
        for name in ("prompt_id", "reference_ids", "tag"):
            for value in self.columns[name]:
                whole.update(repr(value.as_py()).encode())
        return whole.hexdigest()

    def lengths(self, column: str) -> np.ndarray:
        """Return the number of tokens of each prompt ("token_ids") or answer ("reference_ids")."""
        return np.asarray(pc.list_value_length(self.columns[column].drop_null()))


def _ids(scalar: Any) -> tuple[int, ...]:
    return tuple(scalar.values.to_numpy().tolist())


def part_of(messages: tuple[Message, ...], start: int, stop: int) -> tuple[Message, ...]:
    """Return the system message, if there is one, and messages [start, stop)."""
    system = messages[:1] if start and messages[0][0] == "system" else ()
    return (*system, *messages[start:stop])


def batch_of(rows: list[tuple[Any, ...]]) -> pa.RecordBatch:
    """Convert rows with the columns of ``PROMPTS`` to a record batch."""
    columns = zip(*rows, strict=True) if rows else ([] for _ in PROMPTS)
    return pa.record_batch(
        [pa.array(c, kind) for c, kind in zip(columns, PROMPTS.types, strict=True)], schema=PROMPTS
    )
