"""The command ``seqkd``. Each subcommand is a module of this package."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import shtab

from seqkd.cli import compare, evaluate, inspect_data, precompute, report, train
from seqkd.cli.arguments import Parser

COMMANDS = {
    "train": train,
    "evaluate": evaluate,
    "compare": compare,
    "precompute": precompute,
    "inspect": inspect_data,
    "report": report,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit code.

    The exit codes are:

    - 0: success.
    - 1: a bug in seqkd, with a traceback.
    - 2: an error that the user can fix, with a message on stderr.
    - 128 + number: stopped by the signal with this number.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(
        prog="seqkd", description="Sequence-level on-policy distillation of language models."
    )
    shtab.add_argument_to(parser, help="print a completion script for a shell")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        text = module.__doc__ or ""
        command = commands.add_parser(
            name,
            help=text.partition("\n")[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
    if not arguments or arguments[0] not in COMMANDS:
        parser.parse_args(arguments)  # prints help, completion or an error, and exits
    # Only a parser without subcommands accepts options between positional arguments.
    args = commands.choices[arguments[0]].parse_intermixed_args(arguments[1:])
    code: int = COMMANDS[arguments[0]].run(args)
    return code
