"""Methods at equal budget, with several seeds: python scripts/compare.py COMPARISON"""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING

from train import check, quiet

from seqkd.console import print_message, run_command
from seqkd.errors import ConfigError

if TYPE_CHECKING:
    from seqkd.comparison.plan import Comparison, Entry
    from seqkd.comparison.results import Result

SCRIPTS = Path(__file__).parent


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 all runs are over; 2 a message says which is not, or what to mend."""
    parser = argparse.ArgumentParser(
        description="Run several methods with several seeds until each has spent the same, and "
        "tell which differences are real. Interrupted, the same command goes on.",
        epilog="Example: python scripts/compare.py configs/comparisons/study.yaml",
    )
    parser.add_argument("comparison", type=Path, help="YAML file (see docs/comparing.md)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default 1)")
    parser.add_argument("--dry-run", action="store_true", help="check every method; run nothing")
    parser.add_argument("--tables", action="store_true", help="show what there is; run nothing")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs is {args.jobs}, but one run at a time is the least. Set it to 1.")

    def run() -> int:
        from seqkd.comparison import plan

        comparison = plan.load(args.comparison)
        entries = plan.entries(comparison, args.comparison)
        quiet()
        if args.tables:
            return show(comparison, entries)
        for entry in entries:
            over(entry)  # or run with another configuration, which is said before anything begins
        checked(entries[: len(comparison.methods)])
        if args.dry_run:
            for entry in entries:
                print(f"{entry.directory}: {' '.join(entry.arguments[1:])}")
            return 0
        return compare(comparison, entries, args.jobs)

    return run_command(run, "the same command goes on")


def checked(entries: Sequence[Entry]) -> None:
    """Every method's models and data, before the first of them runs for hours."""
    for entry in entries:
        try:
            _, _, found = check(entry.config)
        except ConfigError as error:
            lines = str(error).splitlines()
            raise ConfigError(
                "\n".join(f"methods.{entry.method}: {line}" for line in lines)
            ) from None
        for warning in found.warnings:
            print_message("warning", f"methods.{entry.method}: {warning}")


def compare(comparison: Comparison, entries: Sequence[Entry], jobs: int) -> int:
    """Every run that is not over, ``jobs`` at a time, then the student's evaluation if one is asked
    for."""
    children = Children()

    def run(number: int, entry: Entry) -> bool:
        """Whether anything was run."""
        which = f"[{number}/{len(entries)}] {entry.method}, seed {entry.seed}:"
        begin = not over(entry)
        if begin:
            line(f"{which} {entry.directory}")
            if not children.ran(entry, "train.py", *entry.arguments, "--resume"):
                return False
        line(f"{which} {outcome(entry)}")
        if comparison.evaluate is None or evaluated(entry):
            return begin
        again = ["--no-initial"] if entry.method != comparison.against else []
        children.ran(entry, "evaluate.py", str(entry.directory), *again, *comparison.evaluate)
        return True

    with ThreadPoolExecutor(jobs) as pool:
        work = [pool.submit(run, number, entry) for number, entry in enumerate(entries, 1)]
        try:
            for done in as_completed(work):
                if done.result():
                    update(comparison, entries)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            children.stop()
            raise
    return show(comparison, entries)


def line(text: str) -> None:
    """Written at once, with its end, so that those of two runs do not mix."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def over(entry: Entry) -> bool:
    """Whether a run has come to its end. ConfigError where it was one of another configuration."""
    from seqkd.storage import run_directory, run_reader

    found = run_directory.resumption(entry.directory, entry.config, resume=True)
    if set(found.course) - {"budget.amount"}:
        raise ConfigError(
            f"{entry.directory} was run with another configuration:\n"
            + "".join(f"  {line}\n" for line in found.changes)
            + "Set these as they were, choose a new name, or remove the directory."
        )
    begun = (entry.directory / "metrics.jsonl").exists()
    return begun and not found.course and run_reader.read(entry.directory).over


def outcome(entry: Entry) -> str:
    """The end of a run in a line."""
    from seqkd.comparison.results import FIRST
    from seqkd.evaluation.catalog import labeled
    from seqkd.storage import run_reader

    run = run_reader.read(entry.directory)
    _, figures = run.figures.get("main", (0, {}))
    shown = [f"{labeled(name)} {figures[name].mean:.3g}" for name in FIRST if name in figures]
    return ", ".join([f"{run.done} steps in {run.seconds / 60:.0f} min", *shown])


def evaluated(entry: Entry) -> bool:
    """Whether there is an evaluation of its student."""
    return any(entry.directory.glob("evaluation/*/evaluation.json"))


class Children:
    """The other scripts, each a process of its own, until all are told to stop."""

    def __init__(self) -> None:
        self.running: set[subprocess.Popen[bytes]] = set()
        self.lock, self.stopped = threading.Lock(), False

    def ran(self, entry: Entry, script: str, *arguments: str) -> bool:
        """Run one to its end; whether it succeeded. What it prints is kept beside the run's
        directory."""
        log = entry.directory.with_name(f"{entry.directory.name}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as out:
            begin = out.tell()
            with self.lock:
                if self.stopped:
                    return False
                # In a session of its own: Ctrl-C is for this process, which then tells the others.
                child = subprocess.Popen(
                    [sys.executable, str(SCRIPTS / script), *arguments],
                    stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
                self.running.add(child)
            code = child.wait()
        with self.lock:
            self.running.remove(child)
        if code and not self.stopped:
            said = log.read_bytes()[begin:].decode(errors="replace").splitlines()
            first = next((i for i, line in enumerate(said) if line.startswith("error: ")), -3)
            cause = "\n".join(f"  {line}" for line in said[first:][:8])
            print_message(
                "error", f"{script} ended with exit code {code}; all of it is in {log}\n{cause}"
            )
        return code == 0

    def stop(self) -> None:
        """Tell all to save themselves, and begin no other."""
        with self.lock:
            self.stopped = True
            for child in self.running:
                child.terminate()


def update(comparison: Comparison, entries: Sequence[Entry]) -> Result:
    """Write comparison.json and the page anew."""
    from seqkd.comparison import plan, results
    from seqkd.report import comparison_page as page

    result = results.read(comparison, entries)
    where = plan.directory(entries)
    where.mkdir(parents=True, exist_ok=True)
    results.write(result, where)
    page.write(result, where / "report.html")
    return result


def show(comparison: Comparison, entries: Sequence[Entry]) -> int:
    """The tables, and what is missing."""
    from seqkd.comparison import plan, results

    result = update(comparison, entries)
    where = plan.directory(entries)
    print(f"\n{results.render(result)}\n\n{where / 'comparison.json'}\n{where / 'report.html'}")
    over = sum(run.over for run in result.runs.values())
    return 0 if over == len(entries) else 2


if __name__ == "__main__":
    sys.exit(main())
