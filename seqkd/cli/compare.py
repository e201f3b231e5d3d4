"""Compare methods at equal budget, over several seeds; the same command resumes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING

from seqkd.cli.arguments import add_path
from seqkd.console import print_message, quiet, run_command
from seqkd.errors import ConfigError

if TYPE_CHECKING:
    from seqkd.comparison.plan import Comparison, Entry
    from seqkd.comparison.results import Result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``seqkd compare``."""
    parser.epilog = "Example: seqkd compare configs/comparisons/tiny.yaml"
    add_path(parser, "comparison", type=Path, help="YAML file (see docs/comparing.md)")
    parser.add_argument("--jobs", type=jobs, default=1, help="parallel runs (1)")
    parser.add_argument("--dry-run", action="store_true", help="check every method; run nothing")
    parser.add_argument("--tables", action="store_true", help="print the results; run nothing")


def jobs(text: str) -> int:
    """Parse a number of parallel runs, at least one."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1.")
    return number


def run(args: argparse.Namespace) -> int:
    """Run ``seqkd compare``."""

    def action() -> int:
        from seqkd.comparison import plan, runner

        comparison = plan.load(args.comparison)
        entries = plan.entries(comparison, args.comparison)
        quiet()
        if args.tables:
            return show(comparison, entries)
        for entry in entries:
            runner.is_finished(entry)  # refuses a run of another configuration before any starts
        check_methods(entries[: len(comparison.methods)])
        if args.dry_run:
            for entry in entries:
                print(f"{entry.directory}: {' '.join(entry.arguments[1:])}")
            return 0
        return compare(comparison, entries, args.jobs)

    return run_command(action, "run the same command again to continue")


def check_methods(entries: Sequence[Entry]) -> None:
    """Check the models and data of every method before the first of them runs for hours."""
    from seqkd.training.setup import check

    for entry in entries:
        try:
            _, _, checked = check(entry.config)
        except ConfigError as error:
            lines = str(error).splitlines()
            raise ConfigError(
                "\n".join(f"methods.{entry.method}: {line}" for line in lines)
            ) from None
        for warning in checked.warnings:
            print_message("warning", f"methods.{entry.method}: {warning}")


def compare(comparison: Comparison, entries: Sequence[Entry], jobs: int) -> int:
    """Run every entry that is not finished, ``jobs`` at a time, and evaluate its student if the
    comparison asks for it."""
    from seqkd.comparison import runner

    children = runner.Children()

    def run(number: int, entry: Entry) -> bool:
        """Return whether anything was run."""
        title = f"[{number}/{len(entries)}] {entry.method}, seed {entry.seed}:"
        unfinished = not runner.is_finished(entry)
        if unfinished:
            print_line(f"{title} {entry.directory}")
            if not children.run(entry, "train", *entry.arguments, "--resume"):
                return False
        print_line(f"{title} {runner.outcome(entry)}")
        if comparison.evaluate is None or runner.is_evaluated(entry):
            return unfinished
        options = ["--no-initial"] if entry.method != comparison.against else []
        children.run(entry, "evaluate", str(entry.directory), *options, *comparison.evaluate)
        return True

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(run, number, entry) for number, entry in enumerate(entries, 1)]
        try:
            for future in as_completed(futures):
                if future.result():
                    update(comparison, entries)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            children.stop()
            raise
    return show(comparison, entries)


def print_line(text: str) -> None:
    """Print a line in one write, so that the lines of parallel runs do not mix."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def update(comparison: Comparison, entries: Sequence[Entry]) -> Result:
    """Rewrite comparison.json and the report."""
    from seqkd.comparison import plan, results
    from seqkd.report import comparison_page

    result = results.read(comparison, entries)
    directory = plan.directory(entries)
    directory.mkdir(parents=True, exist_ok=True)
    results.write(result, directory)
    comparison_page.write(result, directory / "report.html")
    return result


def show(comparison: Comparison, entries: Sequence[Entry]) -> int:
    """Print the tables and what is missing; return 2 if a run is not finished."""
    from seqkd.comparison import plan, results

    result = update(comparison, entries)
    directory = plan.directory(entries)
    print(f"\n{results.render(result)}\n\n{directory / 'comparison.json'}")
    print(directory / "report.html")
    return 0 if sum(run.over for run in result.runs.values()) == len(entries) else 2
