"""Rows on disk under an address, in Arrow files that are written once and never changed."""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa

from seqkd.errors import JournalError


class Shards:
    """A directory of Arrow files with one schema, whose first column is ``address``.

    A file is written aside, synced to disk and renamed, so that it is there whole or not at all,
    and several processes may add files. A process sees what was there when it began, and its own.
    """

    def __init__(self, directory: Path, schema: pa.Schema) -> None:
        self.directory, self.schema = directory, schema
        self.places: dict[str, list[tuple[Path, int]]] = {}
        self.files = 0
        for file in sorted(directory.glob("*.arrow")):
            self._index(file)

    def __contains__(self, address: str) -> bool:
        return address in self.places

    def count(self, address: str) -> int:
        """Rows under ``address``."""
        return len(self.places.get(address, ()))

    def rows(self, address: str, first: int, last: int) -> list[dict[str, Any]]:
        """Rows [first, last) under ``address``, in the order in which they were added."""
        return [_row(*place) for place in self.places[address][first:last]]

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Add rows; they are on disk when this returns."""
        if not rows:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        # Numbered for the order, named apart for writers that count alike.
        file = self.directory / f"{self.files:08d}-{uuid.uuid4().hex[:8]}.arrow"
        partial = file.with_suffix(".partial")
        try:
            with partial.open("wb") as out:
                with pa.ipc.new_file(out, self.schema) as writer:
                    writer.write_table(pa.Table.from_pylist(list(rows), self.schema))
                out.flush()
                os.fsync(out.fileno())
            partial.rename(file)
            _sync_directory(self.directory)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise JournalError(
                f"journal.path: {file} cannot be written: {error.strerror}. What was written "
                "before is kept. Make room, or name another directory."
            ) from None
        self._index(file)

    def _index(self, file: Path) -> None:
        for index, address in enumerate(_table(file)["address"].to_pylist()):
            self.places.setdefault(address, []).append((file, index))
        self.files += 1


def _row(file: Path, index: int) -> dict[str, Any]:
    table = _table(file)
    return {name: table[name][index] for name in table.column_names}


@lru_cache(maxsize=64)  # each keeps a file open
def _table(file: Path) -> pa.Table:
    try:
        return pa.ipc.open_file(pa.memory_map(str(file))).read_all()
    except (OSError, pa.ArrowInvalid) as error:
        raise JournalError(
            f"journal.path: {file} is damaged: {' '.join(str(error).split()):.200}. Remove it; "
            "what it held is asked for again."
        ) from None


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
