"""The argument parser, and arguments that several commands share."""

from __future__ import annotations

import argparse
import sys
from typing import Any, NoReturn

from seqkd.console import print_message


class Parser(argparse.ArgumentParser):
    """Parser whose errors have the form of all other errors."""

    def error(self, message: str) -> NoReturn:
        """Print the usage and the error, and exit with code 2."""
        self.print_usage(sys.stderr)
        if message.startswith("unrecognized arguments: -") and "key=value" in self.format_usage():
            message += ". Set a configuration key without dashes: key=value."
        print_message("error", message)
        sys.exit(2)


def add_path(parser: argparse.ArgumentParser, name: str, **options: Any) -> None:
    """Add an argument that shells complete with file names."""
    import shtab  # deferred, because `import seqkd` imports this module

    parser.add_argument(name, **options).complete = shtab.FILE  # type: ignore[attr-defined]


def add_config(parser: argparse.ArgumentParser, help: str, example: str) -> None:
    """Add the configuration file and its overrides. ``example`` is one override."""
    add_path(parser, "config", help=help)
    add_overrides(parser, example)


def add_overrides(parser: argparse.ArgumentParser, example: str) -> None:
    """Add the overrides of configuration keys."""
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help=f"for example {example}"
    )


def at_least_one(text: str) -> int:
    """Parse an integer of at least 1."""
    if text.isdecimal() and (number := int(text)):
        return number
    raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1.")


def add_verbose(parser: argparse.ArgumentParser) -> None:
    """Add ``--verbose``."""
    parser.add_argument("--verbose", action="store_true", help="print the libraries' logs")
