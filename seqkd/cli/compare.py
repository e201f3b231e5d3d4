"""Compare methods at equal budget over several seeds. Rerun the command to resume."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING

from seqkd.cli.arguments import add_path, at_least_one
from seqkd.console import print_message, quiet, run_command, show
from seqkd.errors import ConfigError

if TYPE_CHECKING:
    from seqkd.comparison.plan import Comparison, Entry
    from seqkd.comparison.results import Result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``seqkd compare``."""
    parser.epilog = "Example: seqkd compare configs/comparisons/tiny.yaml"
    add_path(parser, "comparison", type=Path, help="YAML file (see docs/comparing.md)")
    parser.add_argument("--jobs", type=at_least_one, default=1, help="number of parallel runs (1)")
    parser.add_argument(
        "--dry-run", action="store_true", help="check every method without running it"
    )
    parser.add_argument("--tables", action="store_true", help="print the results of finished runs")


def run(args: argparse.Namespace) -> int:
    """Run ``seqkd compare``."""

    def action() -> int:
        from seqkd.comparison import plan, runner

        comparison = plan.load(args.comparison)
        entries = plan.entries(comparison, args.comparison)
        quiet()
        if args.tables:
            return show_results(comparison, entries)
        for entry in entries:
            runner.is_finished(entry)  # raises ConfigError for a run of another configuration
        check_methods(entries[: len(comparison.methods)])
        if args.dry_run:
            for entry in entries:
                show(f"{entry.directory}: {' '.join(entry.arguments[1:])}")
            return 0
        return compare(comparison, entries, args.jobs)

    return run_command(action, "run the same command again to continue")


def check_methods(entries: Sequence[Entry]) -> None:
    """Check the models and data of every method before the first run starts."""
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
    """Run all unfinished entries, ``jobs`` at a time, and evaluate the students if
    ``comparison.evaluate`` is set."""
    from seqkd.comparison import runner

    children = runner.Children()

    def run(number: int, entry: Entry) -> bool:
        """Return whether a command was run."""
        title = f"[{number}/{len(entries)}] {entry.method}, seed {entry.seed}:"
        unfinished = not runner.is_finished(entry)
        if unfinished:
            show(f"{title} {entry.directory}")
            if not children.run(entry, "train", *entry.arguments, "--resume"):
                return False
        show(f"{title} {runner.outcome(entry)}")
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
    return show_results(comparison, entries)


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


def show_results(comparison: Comparison, entries: Sequence[Entry]) -> int:
    """Print the tables and the problems. Return 2 if a run is not finished, else 0."""
    from seqkd.comparison import plan, results

    result = update(comparison, entries)
    directory = plan.directory(entries)
    show("", *results.render(result))
    show(f"\n{directory / 'comparison.json'}", str(directory / "report.html"))
    return 0 if sum(run.over for run in result.runs.values()) == len(entries) else 2
