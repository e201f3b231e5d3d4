"""A run, or several beside each other, as one HTML page that needs nothing else: no network, no
script, no font."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from seqkd.report.run_page import render, save
from seqkd.storage.run_reader import read


def write(directories: Sequence[Path], out: Path, refresh: float | None = None) -> bool:
    """Write the page of these run directories; whether all of them are over.

    Until then a page with ``refresh`` loads itself anew after so many seconds. DataError where a
    directory is no run's, StorageError where the page cannot be written.
    """
    runs = [read(directory) for directory in directories]
    over = all(run.over for run in runs)
    save(render(runs, None if over else refresh), out)
    return over
