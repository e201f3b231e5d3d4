"""Hooks of mkdocs.yml: links to files outside docs/, and references in docstrings."""

from __future__ import annotations

import re
from typing import Any

_OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)\s]+)\)")
"""A link from a page to a file of the repository that is not a page."""
_ROLE = re.compile(r":(?:class|func|mod|attr|data|meth):<code>~?(?:[\w.]+\.)?(\w+)</code>")
"""A cross-reference in a docstring, after conversion to HTML."""


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace links to files outside docs/ by their paths: the site does not contain the files."""
    return _OUTSIDE.sub(_path, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Replace the cross-references of docstrings by the last part of the name."""
    return _ROLE.sub(r"<code>\1</code>", html)


def _path(link: re.Match[str]) -> str:
    text, path = link[1], link[2].partition("#")[0]
    return f"`{path}`" if text.strip("`") in path else f"{text} (`{path}`)"
