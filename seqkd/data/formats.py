"""Conversion of rows in the formats of published data sets to conversations."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard

from seqkd.config.data import DataConfig
from seqkd.config.messages import shown
from seqkd.errors import DataError

Message = tuple[str, str]
"""Role and content."""
ANSWERS = ("reference", "completion", "response", "output", "answer")
CONTEXTS = ("input", "context")
INSTANCES = "instances"
"""Column of SelfInst with a list of inputs and outputs for one instruction."""


class Format(NamedTuple):
    """Format of the rows of a data set: its name and its columns."""

    name: str
    """messages, instruction or prompt."""
    prompt: str
    """Column with the messages, the instruction or the prompt."""
    answer: str | None = None
    """Column with the answers. None if there is none."""
    context: str | None = None
    """Column with text that is appended to the instruction. None if there is none."""

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(filter(None, self[1:]))})"


@dataclass(frozen=True, slots=True)
class Conversation:
    """The messages of a conversation, starting with an optional system message."""

    messages: tuple[Message, ...]
    first_answer: int = 0
    """Index of the first message that may be trained on as an answer."""
    tag: str = ""

    @property
    def identity(self) -> int:
        """64-bit hash of the first user message, ignoring case and white space. It puts
        conversations with the same beginning on the same side of a split."""
        first = next((text for role, text in self.messages if role == "user"), "")
        return int.from_bytes(digest(" ".join(first.casefold().split()).encode()))

    def turns(self, which: str) -> Sequence[int]:
        """Return the number of messages of each prompt.

        A prompt ends before an answer, or at the end of an unanswered conversation. ``which`` is
        "all", "first" or "last".
        """
        roles = [role for role, _ in self.messages]
        earliest = max(self.first_answer, roles.index("user") + 1)
        ends = [i for i in range(earliest, len(roles)) if roles[i] == "assistant"]
        if roles[-1] != "assistant":
            ends.append(len(roles))
        return {"all": ends, "first": ends[:1], "last": ends[-1:]}[which]


def digest(data: bytes) -> bytes:
    """Return an 8-byte hash."""
    return hashlib.blake2b(data, digest_size=8).digest()


def spread(row: dict[str, Any], data: DataConfig) -> Iterator[dict[str, Any]]:
    """Split a row with several instances or several alternative answers into one row for each.
    Other rows are yielded unchanged."""
    instances = row.get(INSTANCES) if "instruction" in row else None
    if isinstance(instances, list) and instances and all(isinstance(i, dict) for i in instances):
        rest = {key: value for key, value in row.items() if key != INSTANCES}
        for instance in instances:
            yield from spread({**rest, **instance}, data)
        return
    answer = data.reference_key or next((key for key in ANSWERS if key in row), "")
    answers = row.get(answer)
    if isinstance(answers, list) and answers and all(map(is_text, answers)):
        yield from ({**row, answer: one} for one in answers)
    else:
        yield row


def detect(row: dict[str, Any], data: DataConfig, where: str) -> Format:
    """Return the format that ``data.format`` selects, for "auto" the first format that matches the
    columns of the row. Raises DataError if there is none."""
    answer = data.reference_key or next((key for key in ANSWERS if key in row), None)
    context = next((key for key in CONTEXTS if key in row), None)
    forms = (
        Format("messages", data.messages_key),
        Format("instruction", "instruction", answer, context),
        Format("prompt", data.prompt_key, answer),
    )
    for form in forms:
        if form.prompt in row and data.format in ("auto", form.name):
            return form
    wanted = " or ".join(repr(f.prompt) for f in forms if data.format in ("auto", f.name))
    raise DataError(
        f"{where}: has no column {wanted}{_has(row)} Set data.messages_key (a column with lists of "
        "messages) or data.prompt_key, and data.reference_key for answers."
    )


def _has(row: dict[str, Any]) -> str:
    return f"; it has {', '.join(map(shown, row)) or 'none':.300}."


def conversation(row: dict[str, Any], form: Format, data: DataConfig, where: str) -> Conversation:
    """Convert one row to a conversation. Raises DataError if the row is invalid."""
    if form.prompt not in row:
        raise DataError(f"{where}: has no column {form.prompt!r}{_has(row)} Fix or remove the row.")
    value, answer = row[form.prompt], row.get(form.answer) if form.answer else None
    if form.name == "messages" or isinstance(value, list):
        context = _messages(value, form.prompt, where)
    else:
        words = text_of(value, form.prompt, where)
        if form.context and not _blank(row.get(form.context)):
            words += f"\n\n{text_of(row[form.context], form.context, where)}"
        context = [("user", words)]
    if isinstance(answer, list):
        messages = [*context, *_messages(answer, str(form.answer), where)]
    elif _blank(answer):  # published data sets have a few rows without an answer
        messages = context
    else:
        messages = [*context, ("assistant", text_of(answer, str(form.answer), where))]
    if data.system is not None and messages[0][0] != "system":
        messages, context = (
            [("system", data.system), *messages],
            [("system", data.system), *context],
        )
    if all(role != "user" for role, _ in messages):
        raise DataError(f"{where}: {form.prompt!r} has no user message. Fix or remove the row.")
    tag = row.get(data.tag_key) if data.tag_key else ""
    if not is_text(tag):
        raise DataError(
            f"{where}: {data.tag_key!r} is {shown(tag)}, not text. Set data.tag_key to a column of "
            f"text{_has(row)}"
        )
    return Conversation(tuple(messages), 0 if form.name == "messages" else len(context), tag)


def text_of(value: Any, key: str, where: str) -> str:
    """Return a value that must be non-blank text. Raises DataError otherwise."""
    if not is_text(value) or not value.strip():
        raise DataError(f"{where}: {key!r} is {shown(value)}, not text. Fix or remove the row.")
    return value


def is_text(value: Any) -> TypeGuard[str]:
    """Return True for valid text. A string with an unpaired surrogate, which JSON can contain, is
    not valid text."""
    try:
        return isinstance(value, str) and (value.isascii() or bool(value.encode()))
    except UnicodeEncodeError:
        return False


def _blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _messages(value: Any, key: str, where: str) -> list[Message]:
    """Convert a list of messages, and drop a blank system message and a blank last answer."""
    if not isinstance(value, list) or not value:
        raise DataError(
            f"{where}: {key!r} is {shown(value)}, not a list of messages. Fix or remove the row."
        )
    messages: list[Message] = []
    for number, message in enumerate(value, 1):
        name = f"{where}: message {number} of {key!r}"
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise DataError(
                f"{name} is {shown(message)}, not {{'role': ..., 'content': ...}}. Fix or remove "
                "the row."
            )
        role, content = message["role"], message["content"]
        if message.get("tool_calls"):
            raise DataError(
                f"{name} has tool_calls, but only text is supported. Fix or remove the row."
            )
        unanswered = number == len(value) and role == "assistant"
        if _blank(content) and messages and unanswered:
            continue
        if _blank(content) and number == 1 and role == "system":
            continue
        if not is_text(role) or not role:
            raise DataError(f"{name}: its role is {shown(role)}, not text. Fix or remove the row.")
        messages.append((role, text_of(content, "content", name)))
    return messages
