"""Configuration of the tasks whose accuracy is measured on held-out prompts."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator

from seqkd.config.base import BaseConfig


class TaskConfig(BaseConfig):
    """A task, which the data set's answers solve. A completion is correct if it ends before
    rollout.max_tokens and its result equals the result of an answer to its prompt. The result of a
    text is the last match of `pattern`."""

    kind: Literal["exact"] = "exact"
    """Comparison of the two results. exact: equal texts."""
    pattern: str = Field(r"\S+", min_length=1)
    """Regular expression of a result, or of the text around a result if it has a group. By default
    a word; `-?[0-9]+` is an integer."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            groups = re.compile(value).groups
        except re.error as error:
            raise ValueError(
                f"{value!r} is not a regular expression: {error}. Correct it."
            ) from None
        if groups > 1:
            raise ValueError(
                f"{value!r} has {groups} groups, but one group marks the result. Write the others "
                "as (?:…)."
            )
        return value
