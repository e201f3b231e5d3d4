"""A YAML file and ``key=value`` overrides -> a validated schema, or what has to be mended."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from seqkd.config.base import BaseConfig
from seqkd.config.messages import explain, shown
from seqkd.errors import ConfigError

Read = TypeVar("Read", bound=BaseConfig)


def read(path: str | Path, schema: type[Read], overrides: Sequence[str] = ()) -> Read:
    """Read a YAML file, apply ``key=value`` overrides (dotted paths, YAML values), validate.

    Raises ConfigError with one line a problem: field, value, mend.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file. Name a configuration file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text: {error}") from None
    data = _parse(text, f"{path}:")
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: holds no keys. A configuration is a mapping of keys to values.")
    for override in overrides:
        _apply(data, override)
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        lines = [explain(item, data, schema) for item in error.errors()]
        raise ConfigError("\n".join(f"{path}: {line}" for line in dict.fromkeys(lines))) from None


class _Loader(yaml.SafeLoader):
    """Refuses what would be lost in silence or break later, with the line that it is on."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        names: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in names:
                raise _refusal(key, "is there twice")
            names.add(str(key.value))
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except (yaml.YAMLError, RecursionError):
            raise
        except Exception:  # of a value such as 2001-99-99, anything at all
            raise _refusal(node, f"is no {node.tag.rpartition(':')[2]}") from None
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise _refusal(node, "is too large a number")
        if isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):
            raise _refusal(node, "is no text")
        return value


def _refusal(node: yaml.Node, why: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=f"{shown(node.value)} {why}", problem_mark=node.start_mark)


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise ConfigError(f"{where} is nested too deeply to be read.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not YAML: {' '.join(str(error).split()):.500}") from None


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    where = f"override {shown(override)}:"
    if not equals or not key or not key.isprintable():
        raise ConfigError(f"{where} is not of the form key=value.")
    value = _parse(text, f"{where} the value")
    *parents, last = key.split(".")
    node = data
    for depth, name in enumerate(parents):
        below = node.get(name)
        if not isinstance(below, dict | None):
            raise ConfigError(
                f"{where} {'.'.join(parents[: depth + 1]):.80} is the value {shown(below)}, "
                "so no key below it can be set."
            )
        node[name] = node = dict(below or {})  # a copy: an alias in the file is another's too
    node[last] = value
