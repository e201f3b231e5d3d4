"""Runs and comparisons as one HTML page that needs no network, script or font."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from seqkd.report.page import save
from seqkd.report.run_page import render
from seqkd.storage.run_reader import read


def write(directories: Sequence[Path], out: Path, refresh: float | None = None) -> bool:
    """Write the page of these run directories; return whether all runs are finished.

    Until then a page with ``refresh`` reloads itself every ``refresh`` seconds. Raises DataError
    where a directory is no run's, StorageError where the page cannot be written.
    """
    runs = [read(directory) for directory in directories]
    over = all(run.over for run in runs)
    save(render(runs, None if over else refresh), out)
    return over
