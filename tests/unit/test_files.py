"""A file or directory is complete or unchanged, wherever the writing process is killed."""

from __future__ import annotations

import os

import pytest

from seqkd.errors import StorageError
from seqkd.files import atomic_directory, atomic_write, disk_errors

CALLS = ("open", "fsync", "rename", "mkdir", "unlink", "rmdir")
"""Functions of os before which a process is killed."""


def write_file(path, text):
    atomic_write(path, text)


def write_directory(path, text):
    with atomic_directory(path) as partial:
        (partial / "below").mkdir()
        (partial / "a").write_text(text)
        (partial / "below" / "b").write_text(text)


def read_file(path):
    return path.read_text() if path.exists() else None


def read_directory(path):
    """Read the content of both files. While a directory is replaced, read the old one."""
    path = path if path.exists() else path.with_name("x.old")
    if not path.exists():
        return None
    first, second = (path / name for name in ("a", "below/b"))
    assert first.read_text() == second.read_text()
    return first.read_text()


def killed_after(number, write, monkeypatch):
    """Run ``write`` in a child process that is killed before call ``number``. Return False if the
    child makes fewer calls."""

    def counted(call):
        def calling(*arguments, **options):
            nonlocal number
            number -= 1
            if number < 0:
                os._exit(9)
            return call(*arguments, **options)

        return calling

    child = os.fork()
    if not child:
        for name in CALLS:
            monkeypatch.setattr(os, name, counted(getattr(os, name)))
        write()
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 9


@pytest.mark.parametrize("before", [None, "old"])
@pytest.mark.parametrize(
    ("write", "read", "calls"),
    [(write_file, read_file, 4), (write_directory, read_directory, 12)],
    ids=["file", "directory"],
)
def test_after_a_kill_at_any_call_the_old_or_the_new_content_is_read(
    tmp_path, monkeypatch, write, read, calls, before
):
    results, number = [], 0
    while True:
        path = tmp_path / str(number) / "x"
        path.parent.mkdir()
        if before:
            write(path, before)
        was_killed = killed_after(number, lambda path=path: write(path, "new"), monkeypatch)
        results.append(read(path))
        if not was_killed:
            break
        write(path, "next")  # leftovers of the killed process do not matter
        assert read(path) == "next"
        assert os.listdir(path.parent) == ["x"]
        number += 1
    assert number >= calls
    assert results[0] == before and results[-1] == "new"
    assert results == sorted(results, key=lambda text: text == "new"), "never reverts"
    assert set(results) == {before, "new"}


@pytest.mark.parametrize("data", ["ä\n", b"\xff\0", ""])
def test_text_is_written_as_utf_8_and_bytes_unchanged(tmp_path, data):
    atomic_write(tmp_path / "x.json", data)
    assert (tmp_path / "x.json").read_bytes() == (data.encode() if isinstance(data, str) else data)
    assert os.listdir(tmp_path) == ["x.json"]


def test_a_failing_block_keeps_the_old_directory(tmp_path):
    write_directory(tmp_path / "x", "old")
    with pytest.raises(KeyError), atomic_directory(tmp_path / "x") as partial:
        (partial / "a").write_text("new")
        raise KeyError
    assert read_directory(tmp_path / "x") == "old"
    assert os.listdir(tmp_path) == ["x"]


def test_a_file_that_cannot_be_written_is_reported_once(tmp_path):
    path = tmp_path / "missing" / "x"
    with pytest.raises(StorageError, match=rf"^{path}: cannot be written: No such file") as caught:
        atomic_write(path, "text")
    with pytest.raises(StorageError) as outer, disk_errors(tmp_path):
        raise caught.value
    assert outer.value is caught.value


@pytest.mark.parametrize(
    "text", ["[Errno 28] No space", "No space (os error 28)", "inline_container.cc:664"]
)
def test_disk_errors_of_libraries_are_recognized(tmp_path, text):
    with pytest.raises(StorageError, match="cannot be written"), disk_errors(tmp_path):
        raise RuntimeError(text)
    with pytest.raises(RuntimeError, match="defect"), disk_errors(tmp_path):
        raise RuntimeError("a defect")
