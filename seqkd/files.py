"""Files and directories that are whole or absent, and errors of the disk in words."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from seqkd.errors import StorageError, TeacherCacheError


def file_digest(file: Path) -> str:
    """xxh3-64 of a file's bytes. Raises OSError."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, xxhash.xxh3_64).hexdigest()


def sync(path: Path) -> None:
    """Have a file's content, or a directory's names, on disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def unwritable(file: Path, error: OSError) -> TeacherCacheError:
    """The error to raise where the disk refuses ``file``."""
    return TeacherCacheError(
        f"{file} cannot be written: {error.strerror or error}. What was written "
        "before is kept. Make room, or name another teacher_cache.path or runs_dir."
    )


def atomic_write(file: Path, text: str) -> None:
    """Write a file of which readers, and a run that goes on after a crash, find all or what was
    there before."""
    partial = file.with_name(file.name + ".partial")
    with partial.open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    partial.rename(file)


DISK = re.compile(r"\[Errno [0-9]+\]|\(os error [0-9]+\)|inline_container\.cc")
"""What another process, safetensors and torch say of a file that cannot be written."""


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """StorageError in place of an error of the disk while the block writes ``path``."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and not DISK.search(str(error)):
            raise
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise StorageError(
            f"{path}: cannot be written: {reason:.300}. What was saved before is kept. Make room, "
            "or give permission, then go on with --resume."
        ) from None
