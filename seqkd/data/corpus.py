"""Plain text, split into pieces of a maximum number of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from seqkd.config.data import DataConfig
from seqkd.config.messages import shown
from seqkd.data.content import ContentTokenizer
from seqkd.data.formats import is_text
from seqkd.data.prompt_table import PromptTable, batch_of
from seqkd.data.read_stats import BATCH, ReadStats, T
from seqkd.data.readers import Source
from seqkd.errors import DataError


def read_corpus(data: DataConfig, tokenizer: Any, eos_id: int) -> tuple[PromptTable, ReadStats]:
    """Read plain text as pieces of at most ``data.corpus_tokens`` tokens.

    The first token of a piece is the prompt, the other tokens are its completion. Every text ends
    with the end-of-sequence token.
    """
    assert data.corpus_path is not None
    source = Source("data.corpus_path", data.corpus_path, data.corpus_subset, data.corpus_split)
    summary, batches = ReadStats(source), []
    content = ContentTokenizer(tokenizer, data.content_tokens)
    for some in _batches(source.rows(data.rows, data.streaming)):
        texts = [_plain(row, data.text_key, where) for where, row in some]
        kept = [text for text in texts if text.strip()]
        summary.blank += len(texts) - len(kept)
        rows = []
        for number, ids in enumerate(content.content(kept, special=True), 1):
            ids = [*ids, eos_id]
            for low in range(0, len(ids) - 1, data.corpus_tokens):
                piece = ids[low : low + data.corpus_tokens]
                if len(piece) > 1:
                    name = f"corpus/{summary.conversations + number}/{low}"
                    cut = low + len(piece) < len(ids)
                    rows.append((name, piece[:1], piece[1:], cut, "", None, 0, 0))
        summary.conversations += len(kept)
        summary.prompts += len(rows)
        batches.append(batch_of(rows))
    if not summary.prompts:
        raise DataError(
            f"{source.field}: {source}: has no rows with text. Add rows, or set data.text_key."
        )
    summary.special = frozenset(content.encoded)
    return PromptTable(batches, []), summary


def _plain(row: dict[str, Any], key: str, where: str) -> str:
    if key not in row:
        raise DataError(
            f"{where}: has no column {key!r}; it has {', '.join(map(shown, row)) or 'none':.300}. "
            "Set data.text_key."
        )
    text = row[key]
    if text is None:
        return ""
    if not is_text(text):
        raise DataError(f"{where}: {key!r} is {shown(text)}, not text. Fix or remove the row.")
    return text


def _batches(items: Iterator[T]) -> Iterator[list[T]]:
    while some := list(islice(items, BATCH)):
        yield some
