"""Rendering of messages as the text and the tokens of the student's input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from seqkd.config.data import DataConfig
from seqkd.data.formats import Message
from seqkd.errors import DataError


class Renderer:
    """Renderer of messages as the student's input, as text and as tokens."""

    def __init__(self, data: DataConfig, tokenizer: Any) -> None:
        self.data, self.tokenizer = data, tokenizer
        self.options = {} if data.thinking is None else {"enable_thinking": data.thinking}
        if data.chat and tokenizer.chat_template is None:
            raise DataError(
                "data.chat: is true, but the student's tokenizer has no chat template. Set it to "
                "false."
            )
        if self.options and not self._supports_thinking():
            raise DataError(
                f"data.thinking: is {str(data.thinking).lower()}, but the student's chat template "
                "has no option enable_thinking. Remove data.thinking."
            )

    def __call__(self, messages: Sequence[Message], where: str, prompt: bool = True) -> str:
        """Render a prompt that the student continues (``prompt=True``) or a complete conversation
        (``prompt=False``)."""
        if not self.data.chat:
            return "\n\n".join(content for _, content in messages)
        try:
            rendered: str = self.tokenizer.apply_chat_template(
                [{"role": role, "content": content} for role, content in messages],
                add_generation_prompt=prompt,
                tokenize=False,
                **self.options,
            )
        except TemplateError as error:
            fix = "Fix or remove the row, or set data.chat to false."
            if self.data.system is not None:
                fix = "Set data.system to null."
            raise DataError(
                f"{where}: the student's chat template rejects the prompt: {error}. {fix}"
            ) from None
        return rendered

    def encode(self, texts: list[str], whole: bool = True) -> list[list[int]]:
        """Tokenize texts. ``whole`` is True for texts at the start of a sequence."""
        special = whole and not self.data.chat  # a chat template adds special tokens itself
        ids: list[list[int]] = []
        if texts:
            ids = self.tokenizer(texts, add_special_tokens=special).input_ids
        return ids

    def difference(
        self, messages: tuple[Message, ...], answer: str, eos_id: int, where: str
    ) -> str | None:
        """Return a warning if the template renders an answer differently from the text that the
        student is trained on, otherwise None."""
        rendered = self((*messages, ("assistant", answer)), where, prompt=False)
        expected = self(messages, where) + answer + self.tokenizer.decode([eos_id])
        if rendered.startswith(expected) and not rendered[len(expected) :].strip():
            return None
        pairs = enumerate(zip(rendered, expected, strict=False))
        at = next((i for i, (a, b) in pairs if a != b), min(len(rendered), len(expected)))
        at = max(0, at - 12)  # some context before the difference
        hint = " Set data.thinking." if self._supports_thinking() and not self.options else ""
        return (
            f"{where}: the student's chat template renders {rendered[at : at + 60]!r}, but the "
            f"student is trained on {expected[at : at + 60]!r}.{hint}"
        )

    def _supports_thinking(self) -> bool:
        return "enable_thinking" in self.tokenizer.get_chat_template()
