"""Conversion of pydantic's validation errors to messages with field, value and fix."""

from __future__ import annotations

import difflib
import reprlib
from typing import Any, get_args

from pydantic import BaseModel

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
_SHORT.maxlevel = 3


def shown(value: Any) -> str:
    """Format a value from a user's file as one printable line of at most 200 characters."""
    return f"{_SHORT.repr(value):.200}"


def explain(item: Any, data: dict[str, Any], schema: type[BaseModel]) -> str:
    """Format one item of ``ValidationError.errors()`` for ``data`` and ``schema`` as one line."""
    # A value error concerns a whole object, so the last part of its location may be a union's tag.
    location = _without_tags(item["loc"], data, keep_last=item["type"] != "value_error")
    field = ".".join(map(str, location))
    message = f"{item['msg'].removeprefix('Value error, '):.500}"
    if item["type"] == "extra_forbidden":
        close = difflib.get_close_matches(
            str(location[-1]), _keys(location[:-1], data, schema), n=1
        )
        hint = f" Did you mean {close[0]!r}?" if close else " Remove it."
        return f"{field}: unknown key.{hint}"
    if item["type"] == "missing":
        return f"{field}: is missing. Set it."
    if item["type"] in ("model_type", "model_attributes_type"):
        keys = _keys(location, data, schema)
        key = "kind" if "kind" in keys else next(iter(keys), "key")
        return f"{field}: {shown(item['input'])} is not a section. Set its keys: {field}.{key}=…"
    if item["type"] in ("tuple_type", "list_type"):
        return f"{field}: {shown(item['input'])} is not a list. Write it in brackets: [a, b]."
    if item["type"] in ("union_tag_invalid", "union_tag_not_found"):
        tags = item["ctx"].get("expected_tags", "")
        tag = item["ctx"].get("tag")
        if tag is None:
            return f"{field}.kind: is missing. Set it."
        return f"{field}.kind: {shown(tag)} is unknown. Use one of {tags}."
    if item["type"] == "value_error":
        return f"{field}: {message}" if field else message
    return f"{field}: {shown(item['input'])}: {message[0].lower()}{message[1:]}."


def _without_tags(location: tuple[Any, ...], data: Any, keep_last: bool) -> list[Any]:
    """Remove the kinds that discriminated unions add to a location. They are not in the file."""
    kept: list[Any] = []
    node = data
    for index, part in enumerate(location):
        last = index == len(location) - 1
        if isinstance(node, dict) and part not in node and not (last and keep_last):
            continue
        kept.append(part)
        node = node.get(part) if isinstance(node, dict) else None
    return kept


def _keys(location: list[Any], data: Any, schema: type[BaseModel]) -> list[str]:
    """List the keys of the schema at ``location``."""
    model: Any = schema
    for part in location:
        model = model.model_fields[part].annotation if part in model.model_fields else None
        options = _models(model)
        node = data = data.get(part) if isinstance(data, dict) else None
        kind = node.get("kind") if isinstance(node, dict) else None
        chosen = [
            m
            for m in options
            if "kind" in m.model_fields and m.model_fields["kind"].default == kind
        ]
        if not options:
            return []
        model = (chosen or options)[0]
    return list(model.model_fields)


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]
