"""Atomic writes of files and directories, and error messages for disk errors."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import xxhash

from seqkd.errors import StorageError

DISK = re.compile(r"\[Errno [0-9]+\]|\(os error [0-9]+\)|inline_container\.cc")
"""Pattern of the messages that other processes, safetensors and torch raise if a file cannot be
written."""


def file_digest(file: Path) -> str:
    """Compute the xxh3-64 digest of a file. Raises OSError."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, xxhash.xxh3_64).hexdigest()


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Convert a disk error in the block, which writes ``path``, to a StorageError with the path."""
    try:
        yield
    except Exception as error:
        is_disk_error = isinstance(error, OSError) or DISK.search(str(error))
        if isinstance(error, StorageError) or not is_disk_error:
            raise
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise StorageError(
            f"{path}: cannot be written: {reason:.300}. Previously saved files are kept. Free disk "
            "space or correct the permissions, then run the command again (a run: with --resume)."
        ) from None


def atomic_write(path: Path, data: str | bytes) -> None:
    """Write a file atomically. Readers, and a run that is resumed after a crash, see either all of
    ``data`` or the previous file. The new file is on disk when this returns. Raises StorageError.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with disk_errors(path):
            with partial.open("wb") as out:
                out.write(data.encode() if isinstance(data, str) else data)
                out.flush()
                os.fsync(out.fileno())
            partial.rename(path)
            _sync(path.parent)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield an empty directory that is renamed to ``path`` when the block ends without error.

    After a crash, ``path`` is complete or absent. A crash while an existing ``path`` is replaced
    may leave the old directory under the name ``path.old``. Creates missing parent directories.
    Raises StorageError.
    """
    partial, old = (path.with_name(path.name + suffix) for suffix in (".partial", ".old"))
    try:
        with disk_errors(path):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            yield partial
            for written in [*partial.rglob("*"), partial]:
                _sync(written)
            if path.exists():  # a directory that is not empty cannot be renamed over
                shutil.rmtree(old, ignore_errors=True)
                path.rename(old)
            partial.rename(path)
            _sync(path.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    """Flush the content of a file or the entries of a directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
