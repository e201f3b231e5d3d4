"""Plan of a comparison: its file, and one run per method and seed."""

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
from seqkd.escaping import as_json
from seqkd.storage import run_directory

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
UNLIMITED = 1_000_000
"""Value of ``steps`` for runs that end by their budget."""


class Comparison(BaseConfig):
    """Methods to compare and the budget of each run."""

    name: str = Field(pattern=NAME)
    """Name of the comparison and of its directory in runs_dir."""
    config: str
    """Base configuration file, relative to the directory of this file. A method can use another
    one."""
    budget: BudgetConfig
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field((0, 1, 2), min_length=1)
    """Seeds of every method."""
    overrides: tuple[str, ...] = ()
    """Overrides (key=value) of all methods."""
    methods: dict[Annotated[str, StringConstraints(pattern=NAME)], tuple[str, ...]] = Field(
        min_length=1
    )
    """Overrides (key=value) of each method, applied after the overrides of all methods. A first
    element without "=" is the configuration file of the method."""
    baseline: str | None = None
    """Method that the others are compared with. If unset: the first method."""
    evaluate: tuple[str, ...] | None = None
    """Arguments of seqkd evaluate, which is run on the student of every run. If unset: it is not
    run."""
    runs_dir: str = "runs"
    """Directory of the run directories, as in a run configuration."""

    @property
    def against(self) -> str:
        """Name of the baseline."""
        return self.baseline or next(iter(self.methods))

    @model_validator(mode="after")
    def _names_are_of_methods(self) -> Comparison:
        if self.against not in self.methods:
            raise ValueError(
                f"baseline {self.baseline!r} is not a method. Set it to one of "
                f"{', '.join(self.methods)}."
            )
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {list(self.seeds)} has a duplicate. Remove it.")
        return self


@dataclass(frozen=True)
class Entry:
    """Run of a comparison."""

    method: str
    seed: int
    arguments: tuple[str, ...]
    """Arguments of seqkd train."""
    config: Config
    directory: Path


def load(path: str | Path) -> Comparison:
    """Read the file. Raises ConfigError with one line per problem: field, value, fix."""
    return read(path, Comparison)


def directory(entries: Sequence[Entry]) -> Path:
    """Return the directory that contains all runs."""
    return entries[0].directory.parent


def entries(comparison: Comparison, path: Path) -> list[Entry]:
    """Return all runs, ordered by seed so that all methods have a result early.

    ``path`` is the file of the comparison. Raises ConfigError, whose message starts with the
    invalid method.
    """
    return [
        Entry(method, seed, tuple(arguments), config, run_directory.locate(config))
        for seed in comparison.seeds
        for method, arguments, config in _runs_of_seed(comparison, path, seed)
    ]


def _runs_of_seed(
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
            f"name={as_json(f'{method}-{seed}')}",
            f"runs_dir={as_json(str(Path(comparison.runs_dir) / comparison.name))}",
            f"seed={seed}",
            f"budget={{kind: {budget.kind}, amount: {budget.amount:.17g}}}",
        ]
        try:
            yield method, [file, *keys], configuration.load(file, keys)
        except ConfigError as error:
            lines = str(error).splitlines()
            raise ConfigError("\n".join(f"methods.{method}: {line}" for line in lines)) from None
