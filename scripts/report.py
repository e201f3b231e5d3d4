"""A run, or several beside each other, as one page: python scripts/report.py RUN [RUN ...]"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

from seqkd import report
from seqkd.console import run_command
from seqkd.errors import Stopped


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 written, 2 a message says what to mend."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="Example: python scripts/report.py runs/quickstart --watch 10"
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="a run directory")
    parser.add_argument(
        "--out", type=Path, help="the page (RUN/report.html; of several runs ./report.html)"
    )
    parser.add_argument(
        "--watch",
        type=interval,
        metavar="SECONDS",
        help="write it anew so often until every run is over; an open page follows",
    )
    args = parser.parse_args(argv)
    runs: list[Path] = args.runs
    out: Path = args.out or (runs[0] if len(runs) == 1 else Path()) / "report.html"
    return run_command(lambda: follow(runs, out, args.watch))


def follow(runs: list[Path], out: Path, seconds: float | None) -> int:
    """Write the page, once or until every run is over."""
    over = report.write(runs, out, seconds)
    print(f"report: {out}", flush=True)
    try:
        while seconds and not over:
            time.sleep(seconds)
            over = report.write(runs, out, seconds)
    except (KeyboardInterrupt, Stopped):
        report.write(runs, out)  # once more, as a page that does not wait for the next
    return 0


def interval(text: str) -> float:
    """Seconds, at least one."""
    seconds = float(text)
    if not 1 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: is not at least one second. Set it to 10, say.")
    return seconds


if __name__ == "__main__":
    sys.exit(main())
