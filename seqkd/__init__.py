"""seqkd: sequence-level on-policy distillation of language models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from seqkd.cli.train import RunResult, train

if TYPE_CHECKING:
    from seqkd.config.run import Config

__all__ = ["RunResult", "__version__", "load_config", "train"]
__version__ = "0.1.0"


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML configuration, apply ``overrides`` such as "learner.lr=1e-5" in order, and
    validate the result.

    Raises:
        ConfigError: Unknown keys, wrong types or impossible combinations, one line per problem.
    """
    from seqkd.config.run import load  # imported here because it imports pydantic

    return load(path, overrides)
