"""Tokenization of content: text of data sets, users and endpoints, which is never a special token.

A tokenizer turns the text ``<|im_end|>`` into the token that ends a turn, no matter who wrote it.
Here, only the markers that the chat template writes become special tokens. The same text in the
content is encoded as ordinary text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from seqkd.errors import DataError

BEGIN, END, HOLD = "\ufdd0", "\ufdd1", "\ufdd2"
"""Unicode noncharacters, which do not occur in text. A marker is written as BEGIN + token + END. A
special token in the content is written as HOLD + its number + HOLD while a template renders."""


class ContentTokenizer:
    """Tokenizer of content.

    It uses a copy of a fast tokenizer in which every special token has another text, BEGIN + token
    + END. All other steps (normalization, pre-tokenization, merges) are the same. Added tokens that
    are not special, such as <think>, are treated like special tokens if the chat template contains
    them. All others, such as runs of line feeds, are ordinary text.

    Args:
        tokenizer: fast tokenizer of the student.
        allowed: added tokens that content may contain as tokens (``data.content_tokens``).
    """

    def __init__(self, tokenizer: Any, allowed: Sequence[str] = ()) -> None:
        self.original = tokenizer
        if unknown := sorted(set(allowed) - tokenizer.get_added_vocab().keys()):
            raise DataError(
                f"data.content_tokens: {unknown[0]!r} is not an added token of the student's "
                "tokenizer. Remove it."
            )
        template = str(tokenizer.chat_template or "")
        self.tokens = {
            token.content: id
            for id, token in tokenizer.added_tokens_decoder.items()
            if token.content not in allowed
            and (token.special or (token.content.strip() and token.content in template))
        }
        """Ids of the tokens that content must not become, by text."""
        longest_first = sorted(self.tokens, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self.marker = re.compile(f"{BEGIN}(?:{self.pattern.pattern}){END}")
        self.encoded: set[str] = set()
        """Special tokens whose text was encoded as ordinary text so far."""

    def has_special(self, text: str) -> bool:
        """Return True if a text contains the text of a special token."""
        special = self.pattern.findall(text)
        self.encoded.update(special)
        return bool(special)

    def content(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        """Return the token ids of texts without markers. With ``special``, the tokenizer's special
        tokens at the start and the end of a sequence are added."""
        ids = self.original(list(texts), add_special_tokens=special).input_ids if texts else []
        for index, text in enumerate(texts):
            if self.has_special(text):
                first, last = self.around if special else ([], [])
                ids[index] = [*first, *self._encode(text), *last]
        return list(ids)

    def rendered(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of texts that a chat template or :meth:`render` wrote."""
        ids = self.original(list(texts), add_special_tokens=False).input_ids if texts else []
        # Not "if BEGIN in text": a message without special tokens may contain that character.
        marked = map(self.marker.search, texts)
        return [self._encode(t) if m else i for t, m, i in zip(texts, marked, ids, strict=True)]

    @cached_property
    def copy(self) -> tuple[Any, dict[int, int]]:
        """The copy, and the original ids of its added tokens."""
        from tokenizers import Tokenizer

        def renamed(text: str) -> str:
            return _marker(text) if text in self.tokens else text

        spec = json.loads(self.original.backend_tokenizer.to_str())
        for token in spec["added_tokens"]:
            token["content"] = renamed(token["content"])
        # A model finds its own entries in ordinary text, Unigram also those of special tokens.
        vocabulary = spec["model"]["vocab"]
        if isinstance(vocabulary, list):
            spec["model"]["vocab"] = [[renamed(text), score] for text, score in vocabulary]
        else:
            spec["model"]["vocab"] = {renamed(text): id for text, id in vocabulary.items()}
            if unknown := spec["model"].get("unk_token"):
                spec["model"]["unk_token"] = renamed(unknown)
        # It would add the sequence's special tokens by their ids, which differ in the copy.
        spec["post_processor"] = spec["truncation"] = spec["padding"] = None
        copy: Any = Tokenizer.from_str(json.dumps(spec))
        added = spec["added_tokens"]
        return copy, {copy.token_to_id(token["content"]): token["id"] for token in added}

    @cached_property
    def around(self) -> tuple[list[int], list[int]]:
        """Special tokens before and after a sequence."""
        (inner,) = self.content(["a"])
        whole = self.original("a").input_ids
        start = next(i for i in range(len(whole)) if whole[i : i + len(inner)] == inner)
        return whole[:start], whole[start + len(inner) :]

    def _encode(self, text: str) -> list[int]:
        """Encode a text in which only markers are special tokens."""
        copy, original = self.copy
        return [original.get(id, id) for id in copy.encode(text, add_special_tokens=False).ids]

    def render(self, contents: Sequence[str], template: Callable[[Sequence[str]], str]) -> str:
        """Render a template with markers for its own special tokens, not for those of the contents.

        Raises DataError if the template changes its output because of a special token in the
        contents, or if the contents have a noncharacter.
        """
        held: list[str] = []

        def hold(match: re.Match[str]) -> str:
            held.append(match[0])
            return f"{HOLD}{len(held) - 1}{HOLD}"

        if any(mark in content for content in contents for mark in (BEGIN, END, HOLD)):
            raise DataError("has a Unicode noncharacter (U+FDD0 to U+FDD2). Remove it.")
        rendered = template([self.pattern.sub(hold, content) for content in contents])
        marked = self.pattern.sub(lambda match: _marker(match[0]), rendered)
        marked = re.sub(f"{HOLD}(\\d+){HOLD}", lambda match: held[int(match[1])], marked)
        if unmarked(marked) != template(contents):
            raise DataError(
                f"the chat template interprets {' '.join(sorted(set(held)))} in a message. Remove "
                "it from the message, or add it to data.content_tokens."
            )
        return marked


def _marker(token: str) -> str:
    return f"{BEGIN}{token}{END}"


def unmarked(text: str) -> str:
    """Return a text with markers as it is displayed."""
    return text.replace(BEGIN, "").replace(END, "")
