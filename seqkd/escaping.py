"""Escapes of text that users, models and endpoints provide, one function per output format.

HTML is escaped by Jinja (seqkd/report/page.py), SVG by matplotlib (seqkd/report/svg.py), YAML by
PyYAML (:func:`seqkd.config.run.as_yaml`).
"""

from __future__ import annotations

import json
import re
from typing import Any

CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Control characters except tab and line feed, line separators, bidirectional overrides, and lone
surrogates."""


def clean(text: str) -> str:
    """Remove the characters that a terminal would interpret."""
    return CONTROL.sub("", text)


def printable(text: str) -> str:
    r"""Replace the same characters by their codes, for example ``\x1b``."""
    return CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


def as_json(value: Any, indent: int | None = None) -> str:
    """Return JSON with readable text, in which the same characters are escape sequences."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def markdown_code(text: str) -> str:
    """Return a Markdown code span with the text on one line."""
    text = printable(text).replace("\n", r"\n")
    fence = _fence(text, 1)
    pad = " " if not text or text[0] in "` " or text[-1] in "` " else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def markdown_block(text: str, language: str) -> str:
    """Return a fenced Markdown block with the lines of the text."""
    fence = _fence(text, 3)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _fence(text: str, at_least: int) -> str:
    """Return more backticks than ``text`` has in sequence."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    return "`" * max(at_least, longest + 1)
