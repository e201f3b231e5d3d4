"""Reading of rows: JSON with file and line numbers for messages, all other formats with
`datasets`."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from seqkd.errors import DataError

Row = dict[str, Any]
JSON, TABLES = (".jsonl", ".json"), {".parquet": "parquet", ".arrow": "arrow"}


@dataclass(frozen=True)
class Source:
    """A file, a glob of files, a directory, or a data set on the hub."""

    field: str
    """Configuration key of the source, for messages."""
    path: str
    subset: str | None = None
    split: str = "train"

    def __str__(self) -> str:
        subset = f", {self.subset}" if self.subset else ""
        return f"{self.path}{subset}{f', {self.split}' if self.split != 'train' else ''}"

    def rows(self, limit: int | None = None, streaming: bool = False) -> Iterator[tuple[str, Row]]:
        """Iterate over (location for messages, row), in order, for at most ``limit`` rows.

        With ``streaming`` only these rows are downloaded from the hub. Raises DataError if the
        source cannot be read.
        """
        files = self._files()
        if files and (self.subset, self.split) != (None, "train"):
            raise DataError(
                f"{self.field}: {self.path}: is a file, which has no subset {self.subset!r} or "
                f"split {self.split!r}. Remove subset and split, or set a directory or hub name."
            )
        if files and files[0].suffix in JSON:
            return islice((row for file in files for row in self._json(file)), limit)
        return self._table(files, limit, streaming)

    def _files(self) -> list[Path]:
        """List the files of the source. Empty for a directory or a data set on the hub."""
        path = Path(self.path).expanduser()
        if path.is_dir():
            return []
        files = [path] if path.is_file() else sorted(map(Path, glob.glob(str(path))))
        if not files and (
            path.is_absolute()
            or glob.has_magic(self.path)
            or self.path.startswith(".")
            or self.path.count("/") > 1
            or path.suffix in (*JSON, *TABLES)
        ):
            raise DataError(
                f"{self.field}: {self.path}: no such file. Set it to a .jsonl, .json, .parquet or "
                ".arrow file, a directory, or a data set on the hub."
            )
        suffixes = {file.suffix for file in files}
        if files and (len(suffixes) > 1 or not suffixes <= {*JSON, *TABLES}):
            raise DataError(
                f"{self.field}: {self.path}: unsupported file types: "
                f"{' and '.join(filter(None, sorted(suffixes))) or 'no suffix'}. Use .jsonl, "
                ".json, .parquet or .arrow files, all of the same type."
            )
        return files

    def _json(self, file: Path) -> Iterator[tuple[str, Row]]:
        name = f"{self.field}: {file}"
        try:
            for number, row in self._items(file, name):
                if not isinstance(row, dict):
                    raise DataError(
                        f"{name}:{number}: is not a JSON object. Fix or remove the row."
                    )
                yield f"{name}:{number}", row
        except OSError as error:
            raise DataError(f"{name}: cannot be read: {error.strerror}. Check the file.") from None
        except UnicodeDecodeError as error:
            raise DataError(
                f"{name}: is not UTF-8 text: {error}. Save it as UTF-8, without compression."
            ) from None

    @staticmethod
    def _items(file: Path, name: str) -> Iterator[tuple[int, Any]]:
        """Yield the rows of a list, or of lines, with their numbers."""
        # Only a line feed ends a line. Other line separators may occur within a string.
        with file.open(encoding="utf-8-sig", newline="\n") as lines:
            start = True
            for number, line in enumerate(lines, 1):
                if start and line.lstrip().startswith("["):
                    yield from enumerate(_parsed(line + lines.read(), name), 1)
                elif line.strip():
                    start = False
                    yield number, _parsed(line, f"{name}:{number}")

    def _table(
        self, files: list[Path], limit: int | None, streaming: bool
    ) -> Iterator[tuple[str, Row]]:
        with self._explained():
            rows = self._load(files, streaming)
            name = f"{self.field}: {self}"
            for number, row in enumerate(islice(rows, limit), 1):
                yield f"{name}: row {number}", row

    def _load(self, files: list[Path], streaming: bool) -> Any:
        import datasets

        if files:
            # Streaming avoids a copy of the files in the cache of `datasets`.
            return datasets.load_dataset(
                TABLES[files[0].suffix],
                data_files=[glob.escape(str(file)) for file in files],
                split="train",
                streaming=True,
            )
        path = Path(self.path).expanduser()
        if (path / "state.json").is_file():
            return datasets.load_from_disk(path)
        if (path / "dataset_dict.json").is_file():
            return datasets.load_from_disk(path)[self.split]
        return datasets.load_dataset(
            str(path) if path.is_dir() else self.path,
            self.subset,
            split=self.split,
            streaming=streaming or path.is_dir(),
        )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Convert errors of `datasets` to a DataError of one line."""
        import datasets
        import pyarrow as pa

        raised = (pa.ArrowException, datasets.exceptions.DatasetsError)
        try:
            yield
        except (OSError, ValueError, KeyError, MemoryError, *raised) as error:
            text = " ".join(str(error.__cause__ or error).split())
            local = Path(self.path).expanduser().exists()
            where = "" if local else "is not a local path, and as a data set on the hub it "
            raise DataError(
                f"{self.field}: {self}: {where}cannot be read: {text[:300]}. Check the name, the "
                "subset and the split" + (". " if local else ", and the network connection.")
            ) from None


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # a number of 5000 digits, 5000 brackets
        raise DataError(
            f"{where}: is not valid JSON: {error}. Write one object per line, or one list of "
            "objects."
        ) from None
