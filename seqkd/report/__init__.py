"""Reports of runs and comparisons: one HTML page without network access, scripts or fonts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from seqkd.report.page import save
from seqkd.report.run_page import render
from seqkd.storage.run_reader import read


def write(directories: Sequence[Path], out: Path, refresh: float | None = None) -> bool:
    """Write the page of these run directories; return whether all runs are finished.

    If a run is not finished, the page reloads itself every ``refresh`` seconds. Raises DataError if
    a directory is not a run directory, StorageError if the page cannot be written.
    """
    runs = [read(directory) for directory in directories]
    over = all(run.over for run in runs)
    save(render(runs, None if over else refresh), out)
    return over
