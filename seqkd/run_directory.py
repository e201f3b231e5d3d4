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


FIRST = ("config.yaml", "student_initial", "student_initial.partial", "tensorboard")
"""What a run writes before its first step: a start that failed there may be tried again."""


def refuse_used(directory: Path) -> None:
    """ConfigError where another run, or anything else, is already there."""
    found = directory.iterdir() if directory.is_dir() else ()
    metrics = directory / "metrics.jsonl"
    if any(path.name not in FIRST and (path != metrics or path.stat().st_size) for path in found):
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
