"""Write an HTML report of one run, or of several runs side by side."""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

from seqkd.cli.arguments import add_path
from seqkd.console import run_command, show
from seqkd.errors import Stopped


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``seqkd report``."""
    parser.epilog = "Example: seqkd report runs/quickstart --watch 10"
    add_path(parser, "runs", nargs="+", metavar="RUN", type=Path, help="a run directory")
    add_path(
        parser,
        "--out",
        type=Path,
        help="output file (RUN/report.html; for several runs ./report.html)",
    )
    parser.add_argument(
        "--watch",
        type=interval,
        metavar="SECONDS",
        help="rewrite the report at this interval until all runs are over; an open page reloads",
    )


def run(args: argparse.Namespace) -> int:
    """Run ``seqkd report``."""
    runs: list[Path] = args.runs
    out: Path = args.out or (runs[0] if len(runs) == 1 else Path()) / "report.html"
    return run_command(lambda: follow(runs, out, args.watch))


def follow(runs: list[Path], out: Path, seconds: float | None) -> int:
    """Write the report once, or every ``seconds`` until all runs are over."""
    from seqkd import report

    over = report.write(runs, out, seconds)
    show(f"report: {out}")
    try:
        while seconds and not over:
            time.sleep(seconds)
            over = report.write(runs, out, seconds)
    except (KeyboardInterrupt, Stopped):
        report.write(runs, out)  # again, without the automatic reload
    return 0


def interval(text: str) -> float:
    """Parse a number of seconds of at least 1."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 1 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of seconds of at least 1. Set it to 10, for example."
        )
    return seconds
