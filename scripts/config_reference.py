"""Write docs/configuration.md from the schema: python scripts/config_reference.py"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from seqkd.config.run import Config

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
HEAD = """\
# Configuration

<!-- Generated from the schema by scripts/config_reference.py; a test compares the two. -->

This page lists every key of a run's configuration with its type, default and meaning.

A run is one YAML file. Any key can be overridden on the command line by its dotted path:
`seqkd train mine.yaml learner.lr=2e-6`. Unknown keys, values out of range and combinations that
cannot work are refused. The message names the field, the value and the fix.

- `seqkd train mine.yaml --dry-run` prints the whole configuration with its defaults. Each run saves
  it as [`config.yaml`](run_directory.md#configuration-and-environment).
- [Fault tolerance](fault_tolerance.md#changes-on-resume) lists the keys that a resumed run may
  change.
- A section with a `kind` accepts the keys of that kind only.
"""
PLAIN = {str: "text", int: "integer", float: "number", bool: "`true`, `false`", NoneType: "`null`"}
BOUNDS = (("gt", "above"), ("ge", "at least"), ("lt", "below"), ("le", "at most"))
FILLED = {"objective": "by `sampler`"}
"""Defaults that a validator sets."""


def models(annotation: Any) -> list[type[BaseModel]]:
    """Return all schemas that a value of this type may have."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in models(part)]


def shown_type(annotation: Any, metadata: tuple[Any, ...] | list[Any] = ()) -> str:
    """Describe a type and its bounds in words."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        (inner, *more) = parts
        bounds = [m for field in more for m in (getattr(field, "metadata", None) or [field])]
        return shown_type(inner, [*metadata, *bounds])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in parts)
    if origin in (Union, UnionType):
        return " or ".join(shown_type(p, () if p is NoneType else metadata) for p in parts)
    if origin is tuple:
        many = parts[-1] is Ellipsis
        return (
            f"list of {shown_type(parts[0])}" if many else f"[{', '.join(map(shown_type, parts))}]"
        )
    limits = [
        f"{word} {value:g}"
        for name, word in BOUNDS
        for bound in metadata
        if (value := getattr(bound, name, None)) is not None
    ]
    return " ".join([PLAIN[annotation], *([", ".join(limits)] if limits else [])])


def shown_default(name: str, field: FieldInfo) -> str:
    """Render a default as YAML, or an empty string for a section, whose keys have defaults."""
    if name in FILLED:
        return FILLED[name]
    if field.is_required():
        return "**required**"
    if isinstance(field.default, BaseModel):
        return ""
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    text = yaml.safe_dump(value, default_flow_style=True)
    return f"`{text.strip().removesuffix('...').strip()}`"


def anchor(heading: str) -> str:
    """Return the URL fragment of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def docstring(model: type[BaseModel]) -> str:
    """Return the docstring of a schema as one paragraph."""
    return " ".join((model.__doc__ or "").replace("|", "\\|").split())


class Reference:
    """Sections in the order in which keys refer to them. Each schema appears once."""

    def __init__(self) -> None:
        self.sections: list[tuple[int, str, str, list[str]]] = []
        """Level, heading, introduction, rows."""
        self.place: dict[type[BaseModel], str] = {}
        """Heading under which a schema is described."""

    def section(self, level: int, heading: str, path: str, model: type[BaseModel]) -> None:
        """Add a section for ``model``, whose keys begin with ``path``, and sections for the schemas
        of its keys."""
        self.place[model] = heading
        later: list[tuple[str, type[BaseModel]]] = []
        rows = list(self._rows(path, model, later))
        self.sections.append((level, heading, docstring(model), rows))
        for key, schema in later:
            if schema not in self.place:
                self.section(level + 1, self._heading(key, schema), key, schema)

    def _rows(
        self, path: str, model: type[BaseModel], later: list[tuple[str, type[BaseModel]]]
    ) -> Iterator[str]:
        """Yield one row per key, ``kind`` and required keys first. Schemas that get their own
        section are appended to ``later``."""
        fields = sorted(
            model.model_fields.items(),
            key=lambda item: (item[0] != "kind", item[0] in FILLED or not item[1].is_required()),
        )
        for name, field in fields:
            key = f"{path}.{name}" if path else name
            options = models(field.annotation)
            default, about = shown_default(name, field), " ".join((field.description or "").split())
            if name == "kind" and selects_keys(model):
                about, default = "Kind, which determines the other keys.", ""
            if not options:
                value = shown_type(field.annotation, field.metadata)
            elif len(options) == 1 and isinstance(field.default, BaseModel) and small(options[0]):
                yield f"| `{key}` | | | {docstring(options[0])} |"
                yield from self._rows(key, options[0], later)
                continue
            else:
                outer: Any = get_origin(field.annotation)
                key += {dict: ".NAME", tuple: "[]"}.get(outer, "")
                value = ", ".join(self._link(self._heading(key, schema)) for schema in options)
                about = about or docstring(*options)
                later += [(key, schema) for schema in options]
            yield f"| `{key}` | {value} | {default} | {about} |"

    def _heading(self, path: str, model: type[BaseModel]) -> str:
        kind = f"{path}, kind {model.model_fields['kind'].default}" if selects_keys(model) else path
        return self.place.get(model) or kind

    def _link(self, heading: str) -> str:
        return f"[{heading.rpartition('kind ')[2]}](#{anchor(heading)})"


def selects_keys(model: type[BaseModel]) -> bool:
    """Return True if the ``kind`` of a schema selects between schemas with different keys."""
    kind = model.model_fields.get("kind")
    return kind is not None and not kind.is_required()


def small(model: type[BaseModel]) -> bool:
    """Return True if the keys of a schema are listed in the table of its parent."""
    return len(model.model_fields) <= 2


def render() -> str:
    """Return the page."""
    reference = Reference()
    reference.section(2, "The run", "", Config)
    parts = [HEAD]
    for level, heading, about, rows in reference.sections:
        parts += [f"{'#' * level} {heading}\n", f"{about}\n"]
        parts += ["| key | value | default | meaning |\n|---|---|---|---|", *rows, ""]
    return "\n".join(parts).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
    print(f"wrote {PAGE}", file=sys.stderr)
