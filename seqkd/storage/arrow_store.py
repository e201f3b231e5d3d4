"""Rows on disk by address, in Arrow files that are written once and never changed."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import xxhash

from seqkd.errors import TeacherCacheError
from seqkd.files import atomic_write, disk_errors, file_digest

ABANDONED_S = 24 * 3600.0
"""Age at which an unfinished file is removed: writing takes seconds, so its writer is dead."""


class ArrowStore:
    """Directory of Arrow files with one schema, whose first column is ``address``.

    Several processes may add files. A file is complete or absent. Its name ends with the digest of
    its content, which is checked when the directory is opened. A process sees the files that
    existed when it opened the directory, and the files it adds.

    Raises TeacherCacheError if a file is damaged. With ``damaged="drop"``, for a directory used by
    one process only, damaged files are skipped and listed in ``dropped``.
    """

    def __init__(
        self, directory: Path, schema: pa.Schema, damaged: Literal["refuse", "drop"] = "refuse"
    ) -> None:
        self.directory, self.schema = directory, schema
        self.places: dict[str, list[tuple[Path, int]]] = {}
        self.position = 0
        """Number of the next file, above that of every existing file."""
        self.dropped: list[str] = []
        self._files: list[Path] = []
        self._own: list[Path] = []
        _remove_abandoned(directory, ABANDONED_S if damaged == "refuse" else 0.0)
        for file in sorted(directory.glob("*.arrow")):
            try:
                addresses = _checked(file, schema)["address"].to_pylist()
            except TeacherCacheError:
                if damaged == "refuse":
                    raise
                addresses = []
                self.dropped.append(file.name)
            self._index(file, addresses)

    def __contains__(self, address: str) -> bool:
        return address in self.places

    def count(self, address: str) -> int:
        """Count the rows under ``address``."""
        return len(self.places.get(address, ()))

    def rows(self, address: str, first: int, last: int) -> list[dict[str, Any]]:
        """Read rows [first, last) under ``address``, in the order in which they were added."""
        return [_row(*place) for place in self.places[address][first:last]]

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append rows; they are on disk when this returns. Raises StorageError."""
        if not rows:
            return
        content = _content(rows, self.schema)
        # The number keeps the order; the random part separates processes that use the same number.
        name = f"{self.position:08d}-{uuid.uuid4().hex[:8]}-{xxhash.xxh3_64_hexdigest(content)}"
        file = self.directory / f"{name}.arrow"
        with disk_errors(file):
            self.directory.mkdir(parents=True, exist_ok=True)
        atomic_write(file, content)
        self._index(file, [row["address"] for row in rows])
        self._own.append(file)

    def commit(self) -> None:
        """Keep everything added so far."""
        self._own.clear()

    def rollback(self) -> None:
        """Remove everything added since the last commit."""
        self._remove(set(self._own))

    def prune(self, before: int) -> None:
        """Remove the files with numbers below ``before`` and their rows."""
        self._remove({file for file in self._files if _number(file) < before})

    def _remove(self, gone: set[Path]) -> None:
        for file in gone:
            with suppress(OSError):  # a leftover file is harmless
                file.unlink()
        self._files = [file for file in self._files if file not in gone]
        self._own = [file for file in self._own if file not in gone]
        kept = {a: [p for p in places if p[0] not in gone] for a, places in self.places.items()}
        self.places = {address: places for address, places in kept.items() if places}
        _table.cache_clear()  # an open file would keep its disk space

    def _index(self, file: Path, addresses: Sequence[str]) -> None:
        for index, address in enumerate(addresses):
            self.places.setdefault(address, []).append((file, index))
        self._files.append(file)
        self.position = max(self.position, _number(file) + 1)


def _content(rows: Sequence[dict[str, Any]], schema: pa.Schema) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(pa.Table.from_pylist(list(rows), schema))
    return sink.getvalue()


def _number(file: Path) -> int:
    match = re.match("[0-9]+", file.name)
    return int(match[0]) if match else -1


def _row(file: Path, index: int) -> dict[str, Any]:
    table = _table(file)
    return {name: table[name][index] for name in table.column_names}


def _checked(file: Path, schema: pa.Schema) -> pa.Table:
    try:
        digest = file_digest(file)
    except OSError as error:
        raise _damaged(file, str(error)) from None
    if not file.stem.endswith(f"-{digest}"):
        raise _damaged(file, f"the digest of its content, {digest}, is not the one in its name")
    table = _table(file)
    if table.schema != schema:
        raise _damaged(file, f"its columns are {', '.join(table.column_names)}")
    return table


@lru_cache(maxsize=64)  # each entry keeps a file open
def _table(file: Path) -> pa.Table:
    try:
        return pa.ipc.open_file(pa.memory_map(str(file))).read_all()
    except (OSError, pa.ArrowException) as error:
        raise _damaged(file, str(error)) from None


def _damaged(file: Path, why: str) -> TeacherCacheError:
    return TeacherCacheError(
        f"{file} is damaged: {' '.join(why.split()):.200}. Remove it; its content will be "
        "requested again."
    )


def _remove_abandoned(directory: Path, age_s: float) -> None:
    for partial in directory.glob("*.partial"):
        with suppress(OSError):  # another process may remove it too, or the disk is read-only
            if time.time() - partial.stat().st_mtime >= age_s:
                partial.unlink()
