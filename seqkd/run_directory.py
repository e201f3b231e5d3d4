"""The run directory: where it is, and that it holds one run only."""

from __future__ import annotations

from pathlib import Path

from seqkd.config import Config, dump
from seqkd.errors import ConfigError

PACKAGED = "working_dir_files"
"""A folder in the path of every working directory that Ray unpacks for a job."""


def locate(config: Config) -> Path:
    """``runs_dir/name``. A relative ``runs_dir`` is taken from the working directory; within a
    job whose working directory is a copy that Ray will delete, from ~/seqkd."""
    runs = Path(config.runs_dir).expanduser()
    if not runs.is_absolute() and PACKAGED in Path.cwd().parts:
        runs = Path.home() / "seqkd" / runs
    return (runs / config.name).absolute()


def refuse_used(directory: Path) -> None:
    """ConfigError where another run is already there."""
    if directory.exists() and any(directory.iterdir()):
        raise ConfigError(
            f"name: {directory} already holds another run. Choose a new name=…, or remove it."
        )


def create(directory: Path, config: Config) -> None:
    """Make the directory and write the resolved configuration into it."""
    refuse_used(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.yaml").write_text(dump(config), encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"runs_dir: {directory} cannot be written: {error.strerror}. Name another directory."
        ) from None
