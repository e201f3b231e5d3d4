"""Execution of the runs of a comparison in child processes, and the state of each run."""

from __future__ import annotations

import subprocess
import sys
import threading

from seqkd.comparison.plan import Entry
from seqkd.comparison.results import FIRST
from seqkd.console import print_message
from seqkd.errors import ConfigError
from seqkd.evaluation.catalog import labeled
from seqkd.storage import run_directory, run_reader


def is_finished(entry: Entry) -> bool:
    """Return whether a run is finished. Raises ConfigError if it has another configuration."""
    resumption = run_directory.resumption(entry.directory, entry.config, resume=True)
    if set(resumption.trajectory) - {"budget.amount"}:
        raise ConfigError(
            f"{entry.directory} is a run with another configuration:\n"
            + "".join(f"  {line}\n" for line in resumption.changes)
            + "Restore these values, choose a new name, or remove the directory."
        )
    started = (entry.directory / "metrics.jsonl").exists()
    return started and not resumption.trajectory and run_reader.read(entry.directory).over


def is_evaluated(entry: Entry) -> bool:
    """Return whether the student of a run has been evaluated by ``seqkd evaluate``."""
    return any(entry.directory.glob("evaluation/*/evaluation.json"))


def outcome(entry: Entry) -> str:
    """Summarize a finished run in one line."""
    run = run_reader.read(entry.directory)
    _, figures = run.figures.get("main", (0, {}))
    shown = [f"{labeled(name)} {figures[name].mean:.3g}" for name in FIRST if name in figures]
    return ", ".join([f"{run.done} steps in {run.seconds / 60:.0f} min", *shown])


class Children:
    """``seqkd`` commands in child processes."""

    def __init__(self) -> None:
        self.running: set[subprocess.Popen[bytes]] = set()
        self.lock, self.stopped = threading.Lock(), False

    def run(self, entry: Entry, command: str, *arguments: str) -> bool:
        """Run ``seqkd command`` and wait; return whether it succeeded. The output is appended to
        the log file next to the run directory. If the command fails, its error is printed."""
        log = entry.directory.with_name(f"{entry.directory.name}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as out:
            begin = out.tell()
            with self.lock:
                if self.stopped:
                    return False
                # A new session, so that Ctrl-C reaches only this process, which stops the children.
                child = subprocess.Popen(
                    [sys.executable, "-m", "seqkd", command, *arguments],
                    stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
                self.running.add(child)
            code = child.wait()
        with self.lock:
            self.running.remove(child)
        if code and not self.stopped:
            lines = log.read_bytes()[begin:].decode(errors="replace").splitlines()
            first = next((i for i, line in enumerate(lines) if line.startswith("error: ")), -3)
            cause = "\n".join(f"  {line}" for line in lines[first:][:8])
            print_message(
                "error", f"seqkd {command} failed with exit code {code}. Log: {log}\n{cause}"
            )
        return code == 0

    def stop(self) -> None:
        """Terminate all children, which save a checkpoint first, and start no new ones."""
        with self.lock:
            self.stopped = True
            for child in self.running:
                child.terminate()
