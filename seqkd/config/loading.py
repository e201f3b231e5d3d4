"""Reading of a YAML file and ``key=value`` overrides into a validated schema."""

from __future__ import annotations

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
    """Read a YAML file, apply ``key=value`` overrides (dotted paths, YAML values) and validate.

    Raises:
        ConfigError: One line per problem, with field, value and fix.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file. Check the path.") from None
    except IsADirectoryError:
        saved = path / "config.yaml"
        fix = f"{saved}, with --resume" if saved.is_file() else "a YAML file"
        raise ConfigError(f"{path}: is a directory. Pass {fix}.") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}. Check the file.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: is not UTF-8 text: {error}. Pass a YAML file, saved as UTF-8."
        ) from None
    data = _parse(text, f"{path}:")
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: is not a mapping. Write lines of the form 'key: value'.")
    for override in overrides:
        _apply(data, override)
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        lines = [explain(item, data, schema) for item in error.errors()]
        raise ConfigError("\n".join(f"{path}: {line}" for line in dict.fromkeys(lines))) from None


class _Loader(yaml.SafeLoader):
    """A safe loader that rejects repeated keys. YAML would silently use the last value."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        names: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in names:
                raise yaml.MarkedYAMLError(
                    problem=f"key {shown(key.value)} is repeated", problem_mark=key.start_mark
                )
            names.add(str(key.value))
        return node


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark, problem = error.problem_mark, " ".join(str(error.problem).split())
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        fix = " Indent with spaces." if "'\\t'" in problem else ""
        raise ConfigError(f"{where} is not valid YAML: {place}{problem:.300}.{fix}") from None
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{where} is not valid YAML: {' '.join(str(error).split()):.300}"
        ) from None
    except Exception as error:  # a value such as 2001-99-99, or nesting beyond Python's stack
        raise ConfigError(f"{where} cannot be read: {' '.join(str(error).split()):.200}") from None


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    where = f"override {shown(override)}:"
    if not equals or not key:
        raise ConfigError(f"{where} is not of the form key=value. Write for example seed=1.")
    value = _parse(text, f"{where} the value")
    *parents, last = key.split(".")
    node = data
    for depth, name in enumerate(parents):
        below = node.get(name)
        if not isinstance(below, dict | None):
            raise ConfigError(
                f"{where} {'.'.join(parents[: depth + 1])} is {shown(below)}, not a section with "
                "keys. Remove the override, or change the file."
            )
        node[name] = node = dict(below or {})  # a copy: a YAML alias shares the mapping
    node[last] = value
