"""What is compared: the file that says so, and the run of each method and seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, StringConstraints, model_validator

from seqkd.config import run as configuration
from seqkd.config.base import BaseConfig
from seqkd.config.lifecycle import BudgetConfig
from seqkd.config.loading import read
from seqkd.config.run import Config
from seqkd.errors import ConfigError
from seqkd.storage import run_directory

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
UNLIMITED = 1_000_000
"""Steps, where nothing but the budget is to end a run."""


class Comparison(BaseConfig):
    """Methods, and what each may spend."""

    name: str = Field(
        pattern=NAME, description="Of the comparison, and of its directory within runs_dir."
    )
    config: str = Field(
        description="Configuration of every method that names no other; from this file's directory."
    )
    budget: BudgetConfig
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (0, 1, 2), min_length=1, description="Every method is run with each."
    )
    overrides: tuple[str, ...] = Field((), description="key=value for all methods.")
    methods: dict[Annotated[str, StringConstraints(pattern=NAME)], tuple[str, ...]] = Field(
        min_length=1,
        description="Of each its key=value, after those for all; a first element without = is its "
        "configuration.",
    )
    baseline: str | None = Field(
        None, description="The method that the others are compared with; the first if left out."
    )
    evaluate: tuple[str, ...] | None = Field(
        None, description="Arguments of seqkd evaluate, for the student of every run."
    )
    runs_dir: str = Field("runs", description="As in a configuration.")

    @property
    def against(self) -> str:
        """The baseline."""
        return self.baseline or next(iter(self.methods))

    @model_validator(mode="after")
    def _names_are_of_methods(self) -> Comparison:
        if self.against not in self.methods:
            raise ValueError(
                f"baseline {self.baseline!r} is none of the methods. Name one of "
                f"{', '.join(self.methods)}."
            )
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {list(self.seeds)}: one is there twice. Remove it.")
        return self


@dataclass(frozen=True)
class Entry:
    """One run of a comparison."""

    method: str
    seed: int
    arguments: tuple[str, ...]
    """Of seqkd train."""
    config: Config
    directory: Path


def load(path: str | Path) -> Comparison:
    """ConfigError with one line a problem: field, value, mend."""
    return read(path, Comparison)


def directory(entries: Sequence[Entry]) -> Path:
    """Of all its runs."""
    return entries[0].directory.parent


def entries(comparison: Comparison, path: Path) -> list[Entry]:
    """Every run, those of one seed after those of another, so that methods can be compared early.
    ``path`` is the file of the comparison; ConfigError names the method that cannot be."""
    return [
        Entry(method, seed, tuple(given), config, run_directory.locate(config))
        for seed in comparison.seeds
        for method, given, config in _of_seed(comparison, path, seed)
    ]


def _of_seed(
    comparison: Comparison, path: Path, seed: int
) -> Iterator[tuple[str, list[str], Config]]:
    budget = comparison.budget
    for method, own in comparison.methods.items():
        file, keys = comparison.config, list(own)
        if keys and "=" not in keys[0]:
            file = keys.pop(0)
        file = str(path.parent / Path(file).expanduser())
        keys = [
            f"steps={UNLIMITED}",
            *comparison.overrides,
            *keys,
            f"name={method}-{seed}",
            f"runs_dir={Path(comparison.runs_dir) / comparison.name}",
            f"seed={seed}",
            f"budget={{kind: {budget.kind}, amount: {budget.amount:.17g}}}",
        ]
        try:
            yield method, [file, *keys], configuration.load(file, keys)
        except ConfigError as error:
            lines = str(error).splitlines()
            raise ConfigError("\n".join(f"methods.{method}: {line}" for line in lines)) from None
