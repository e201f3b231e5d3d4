"""Data set -> prompts, and a stream of them whose position can be saved."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError

from seqkd.config import JsonlData
from seqkd.errors import DataError
from seqkd.types import Prompt


class PromptStream:
    """Endless, shuffled anew each epoch; the same for the same seed and position."""

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        self.prompts, self.seed = prompts, seed
        self.position = 0
        """Prompts handed out so far."""

    def take(self, count: int) -> list[Prompt]:
        """The next ``count`` prompts, across the end of an epoch where need be."""
        size = len(self.prompts)
        indices = [
            self._order(p // size)[p % size] for p in range(self.position, self.position + count)
        ]
        self.position += count
        return [self.prompts[i] for i in indices]

    def _order(self, epoch: int) -> Any:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.prompts))


def read_prompts(
    data: JsonlData, path: str, field: str, tokenizer: Any, eos_id: int, max_reference: int
) -> tuple[list[Prompt], int]:
    """Prompts of one JSONL file, and how many rows were left out as too long.

    Rows with the same tokens are read once. Where ``max_reference`` is above 0 every row must have
    an answer, which gets the end-of-sequence token ``eos_id`` and has at most that many tokens.
    DataError names the file, the line and the mend.
    """
    prompts: dict[tuple[str, tuple[int, ...] | None], Prompt] = {}
    too_long = 0
    for number, row in _rows(path, field):
        where = f"{field}: {path}:{number}"
        text = _text(row, data.prompt_key, where)
        ids = tuple(_render(text, data, tokenizer))
        if len(ids) > data.max_prompt_tokens:
            too_long += 1
            continue
        reference = None
        if max_reference:
            answer = _text(row, data.reference_key, where)
            reference = (*tokenizer(answer, add_special_tokens=False).input_ids, eos_id)
            if len(reference) > max_reference:
                too_long += 1
                continue
        prompt_id = hashlib.blake2b(repr(ids).encode(), digest_size=8).hexdigest()
        messages = tuple((m["role"], m["content"]) for m in _messages(text, data))
        row_id = prompt_id, reference  # other answers to the same prompt are other rows
        prompts.setdefault(row_id, Prompt(prompt_id, ids, text, reference, messages))
    if not prompts and too_long:
        raise DataError(
            f"{field}: {path}: all {too_long} rows are longer than data.max_prompt_tokens = "
            f"{data.max_prompt_tokens}"
            + (f" or rollout.max_tokens = {max_reference} (the answer)" if max_reference else "")
            + ". Raise it (the models' context permitting) or shorten them."
        )
    if not prompts:
        raise DataError(f"{field}: {path}: has no rows. Write one JSON object a line.")
    return list(prompts.values()), too_long


def read_corpus(data: JsonlData, tokenizer: Any, eos_id: int) -> list[Prompt]:
    """Pieces of plain text, at most ``data.corpus_tokens`` tokens each: the first token is the
    prompt, the others its completion. A text ends with the end-of-sequence token."""
    assert data.corpus_path is not None
    pieces = []
    for number, row in _rows(data.corpus_path, "data.corpus_path"):
        text = _text(row, data.text_key, f"data.corpus_path: {data.corpus_path}:{number}")
        ids = (*tokenizer(text).input_ids, eos_id)
        for low in range(0, len(ids) - 1, data.corpus_tokens):
            piece = ids[low : low + data.corpus_tokens]
            if len(piece) > 1:
                name = f"corpus/{number}/{low}"
                pieces.append(Prompt(name, piece[:1], text, piece[1:]))
    if not pieces:
        raise DataError(f"data.corpus_path: {data.corpus_path}: has no rows. Write one a line.")
    return pieces


def _rows(path: str, field: str) -> Iterator[tuple[int, dict[str, Any]]]:
    file = Path(path).expanduser()
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise DataError(f"{field}: {path}: no such file. Name a JSONL file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{field}: {path}: cannot be read as UTF-8 text: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{field}: {path}:{number}: is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise DataError(f"{field}: {path}:{number}: is not a JSON object.")
        yield number, row


def _text(row: dict[str, Any], key: str, where: str) -> str:
    if key not in row:
        raise DataError(
            f"{where}: has no column {key!r}; it has {', '.join(map(repr, row)) or 'none'}. Set "
            "data.prompt_key, data.reference_key or data.text_key to the column's name."
        )
    value = row[key]
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: {key!r} is {value!r:.60}, not text. Mend or remove the row.")
    return value


def _messages(text: str, data: JsonlData) -> list[dict[str, str]]:
    system = [{"role": "system", "content": data.system}] if data.system is not None else []
    return [*system, {"role": "user", "content": text}]


def _render(text: str, data: JsonlData, tokenizer: Any) -> list[int]:
    if not data.chat:
        ids: list[int] = tokenizer(
            text if data.system is None else f"{data.system}\n\n{text}"
        ).input_ids
        return ids
    if tokenizer.chat_template is None:
        raise DataError(
            "data.chat: is true, but the student's tokenizer has no chat template. Set it to false."
        )
    try:
        rendered = tokenizer.apply_chat_template(
            _messages(text, data), add_generation_prompt=True, tokenize=False
        )
    except TemplateError as error:
        mend = "data.system to null" if data.system is not None else "data.chat to false"
        raise DataError(
            f"data.chat: the student's chat template refuses the prompt: {error}. Set {mend}."
        ) from None
    rendered_ids: list[int] = tokenizer(rendered, add_special_tokens=False).input_ids
    return rendered_ids
