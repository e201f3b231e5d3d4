"""The command ``seqkd``: one module per subcommand."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import shtab

from seqkd.cli import compare, evaluate, inspect_data, precompute, report, train

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

    0: done. 2: a message on stderr says what to fix. 1: a defect, with its traceback. 128 + number:
    stopped by a signal.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
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
        parser.parse_args(arguments)  # exits, with help, completion or an error
    # A parser with subcommands cannot take options between positional arguments; this one can.
    args = commands.choices[arguments[0]].parse_intermixed_args(arguments[1:])
    code: int = COMMANDS[arguments[0]].run(args)
    return code
