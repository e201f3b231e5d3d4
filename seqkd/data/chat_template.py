"""Rendering of messages as the text and the tokens of the student's input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from seqkd.config.data import DataConfig
from seqkd.data.content import ContentTokenizer, unmarked
from seqkd.data.formats import Message
from seqkd.errors import DataError


class Renderer:
    """Renderer of messages as the student's input, as text and as tokens."""

    def __init__(self, data: DataConfig, tokenizer: Any) -> None:
        self.data, self.tokenizer = data, tokenizer
        self.content = ContentTokenizer(tokenizer, data.content_tokens)
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
        (``prompt=False``). If a message contains the text of a special token, the template's
        special tokens are marked (:meth:`seqkd.data.content.ContentTokenizer.render`)."""
        contents = [content for _, content in messages]
        if not self.data.chat:
            return "\n\n".join(contents)

        def template(contents: Sequence[str]) -> str:
            pairs = zip(messages, contents, strict=True)
            rendered: str = self.tokenizer.apply_chat_template(
                [{"role": role, "content": content} for (role, _), content in pairs],
                add_generation_prompt=prompt,
                tokenize=False,
                **self.options,
            )
            return rendered

        special = [self.content.has_special(content) for content in contents]
        try:
            if any(special):
                return self.content.render(contents, template)
            return template(contents)
        except TemplateError as error:
            fix = "Fix or remove the row, or set data.chat to false."
            if self.data.system is not None:
                fix = "Set data.system to null."
            raise DataError(
                f"{where}: the student's chat template rejects the prompt: {error}. {fix}"
            ) from None
        except DataError as error:
            raise DataError(f"{where}: {error}") from None

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Tokenize texts that this renderer returned."""
        if self.data.chat:
            return self.content.rendered(texts)
        return self.content.content(texts, special=True)

    def difference(
        self, messages: tuple[Message, ...], answer: str, eos_id: int, where: str
    ) -> str | None:
        """Return a warning if the template renders an answer differently from the text that the
        student is trained on, otherwise None."""
        rendered = unmarked(self((*messages, ("assistant", answer)), where, prompt=False))
        expected = unmarked(self(messages, where)) + answer + self.tokenizer.decode([eos_id])
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
