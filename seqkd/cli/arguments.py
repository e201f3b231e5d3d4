"""Arguments that several commands share."""

from __future__ import annotations

import argparse
from typing import Any


def add_path(parser: argparse.ArgumentParser, name: str, **options: Any) -> None:
    """Add an argument that a shell completes with file names."""
    import shtab  # here, as `import seqkd` comes through this module

    parser.add_argument(name, **options).complete = shtab.FILE  # type: ignore[attr-defined]


def add_config(parser: argparse.ArgumentParser, help: str, example: str) -> None:
    """Add the configuration file and its overrides; ``example`` is one override."""
    add_path(parser, "config", help=help)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"e.g. {example}")


def add_verbose(parser: argparse.ArgumentParser) -> None:
    """Add ``--verbose``."""
    parser.add_argument("--verbose", action="store_true", help="show the logs of the libraries")
