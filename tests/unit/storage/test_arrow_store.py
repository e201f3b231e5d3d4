"""Acknowledged rows are stored exactly once, and damaged files are detected."""

from __future__ import annotations

import os
import pickle
import random
import subprocess
import sys
import time

import pyarrow as pa
import pytest

from seqkd.errors import StorageError, TeacherCacheError
from seqkd.storage.arrow_store import ABANDONED_S, ArrowStore
from tests.conftest import ROOT

SCHEMA = pa.schema([("address", pa.string()), ("value", pa.large_binary())])


def filled(directory, appends=1, rows=2):
    shards = ArrowStore(directory, SCHEMA)
    for number in range(appends):
        shards.append([row(f"{number}/{i}") for i in range(rows)])
    return shards


def row(address, size=100):
    return {"address": address, "value": random.Random(address).randbytes(size)}


def value(shards, address):
    (stored,) = shards.rows(address, 0, shards.count(address))
    return stored["value"].as_py()


def files(directory):
    return sorted(directory.glob("*.arrow"))


def test_rows_are_read_in_insertion_order(tmp_path):
    first, second = ArrowStore(tmp_path, SCHEMA), ArrowStore(tmp_path, SCHEMA)
    for number in range(3):
        first.append([{"address": "a", "value": bytes([number])}, row("b")])
    second.append([{"address": "a", "value": b"other"}])  # the same file number as the first
    assert second.count("a") == 1
    again = ArrowStore(tmp_path, SCHEMA)
    values = [r["value"].as_py() for r in again.rows("a", 0, 4)]
    assert sorted(values) == [b"\0", b"\1", b"\2", b"other"]
    assert [v for v in values if v != b"other"] == [b"\0", b"\1", b"\2"]
    assert (again.count("b"), again.count("c")) == (3, 0)


def test_equal_rows_of_two_writers_are_both_kept(tmp_path):
    for shards in [ArrowStore(tmp_path, SCHEMA), ArrowStore(tmp_path, SCHEMA)]:
        shards.append([row("a")])
    assert ArrowStore(tmp_path, SCHEMA).count("a") == 2


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "append", "zero", "name", "columns"])
def test_damaged_file_is_detected_at_any_position(tmp_path, damage):
    filled(tmp_path)
    (file,) = files(tmp_path)
    content = file.read_bytes()
    versions = {
        "flip": [content[:i] + bytes([content[i] ^ 4]) + content[i + 1 :]
                 for i in range(0, len(content), 7)],
        "cut": [content[:i] for i in range(0, len(content), 7)],
        "empty": [b""],
        "append": [content + b"\0", content * 2],
        "zero": [content[:-300] + bytes(300)],
        "name": [content],
        "columns": [content],
    }[damage]  # fmt: skip
    if damage == "name":
        file = file.rename(tmp_path / "00000000-another.arrow")
    schema = pa.schema([("address", pa.string())]) if damage == "columns" else SCHEMA
    for version in versions:
        file.write_bytes(version)
        with pytest.raises(
            TeacherCacheError, match=rf"{file.name} is damaged: .*\. Remove it; its content"
        ):
            ArrowStore(tmp_path, schema)


def test_damaged_file_can_be_dropped(tmp_path):
    filled(tmp_path, appends=3)
    damaged = files(tmp_path)[2]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    shards = ArrowStore(tmp_path, SCHEMA, damaged="drop")
    assert shards.dropped == [damaged.name]
    assert sorted(shards.places) == ["0/0", "0/1", "1/0", "1/1"]
    assert shards.position == 3, "above the damaged file"
    shards.append([row("2/0")])
    assert value(ArrowStore(tmp_path, SCHEMA, damaged="drop"), "2/0") == row("2/0")["value"]


def test_file_numbers_increase_and_old_files_can_be_pruned(tmp_path):
    shards = filled(tmp_path, appends=4)
    assert shards.position == 4
    kept = files(tmp_path)[3]
    shards.prune(before=3)
    assert files(tmp_path) == [kept]
    assert sorted(shards.places) == ["3/0", "3/1"]
    assert (shards.position, value(shards, "3/1")) == (4, row("3/1")["value"])
    again = ArrowStore(tmp_path, SCHEMA)
    assert again.position == 4
    again.append([row("new")])
    assert files(tmp_path)[1].name.startswith("00000004-")


def test_a_store_that_is_pruned_stays_small(tmp_path):
    shards, sizes = ArrowStore(tmp_path, SCHEMA), []
    for number in range(100, 130):
        shards.append([row(f"{number}/0")])
        shards.prune(before=shards.position - 2)
        sizes.append(len(pickle.dumps(vars(shards))))
    assert sizes[5] == sizes[-1]


def test_abandoned_files_are_removed_and_current_ones_kept(tmp_path):
    filled(tmp_path)
    old, new = tmp_path / "00000001-a.partial", tmp_path / "00000001-b.partial"
    for partial in (old, new):
        partial.write_bytes(b"half")
    long_ago = time.time() - ABANDONED_S - 60
    os.utime(old, (long_ago, long_ago))
    assert len(ArrowStore(tmp_path, SCHEMA).places) == 2
    assert (old.exists(), new.exists()) == (False, True)


WRITER = """
import random, resource, signal, sys
from pathlib import Path
from tests.unit.storage.test_arrow_store import SCHEMA, ArrowStore, row
if len(sys.argv) > 3:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
shards = ArrowStore(Path(sys.argv[1]), SCHEMA)
for number in range(10**6):
    name = f"{sys.argv[2]}-{number}"
    shards.append([row(f"{name}/{i}", 200_000 * (number + 1 if len(sys.argv) > 3 else 1))
                   for i in range(2)])
    print(name, flush=True)
"""


def writer(directory, *arguments):
    return subprocess.Popen([sys.executable, "-c", WRITER, str(directory), *arguments], cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip


def test_killed_writer_loses_no_acknowledged_row(tmp_path):
    moments, acknowledged = random.Random(0), []
    for kill in range(12):
        with writer(tmp_path, str(kill)) as process:
            acknowledged += [
                process.stdout.readline().strip() for _ in range(moments.randint(1, 4))
            ]
            time.sleep(moments.uniform(0, 0.004))  # anywhere within an append
            process.kill()
            acknowledged += process.stdout.read().split()
    shards = ArrowStore(tmp_path, SCHEMA)
    names = {address.partition("/")[0] for address in shards.places}
    assert set(acknowledged) <= names
    assert len(acknowledged) > 12
    assert len(names - set(acknowledged)) <= 12, "at most one unacknowledged append per writer"
    for name in names:
        for address in (f"{name}/0", f"{name}/1"):
            assert value(shards, address) == row(address, 200_000)["value"], address


def test_full_disk_raises_and_keeps_written_rows(tmp_path):
    with writer(tmp_path, "w", "1000000") as process:
        output, errors = process.communicate()
    assert output.split() == ["w-0", "w-1"]
    last = errors.strip().splitlines()[-1]
    assert "cannot be written: File too large. Previously saved files are kept. Free disk" in last
    assert sorted(ArrowStore(tmp_path, SCHEMA).places) == ["w-0/0", "w-0/1", "w-1/0", "w-1/1"]
    assert not list(tmp_path.glob("*.partial"))


def test_unwritable_directory_raises(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"file/.*cannot be written: Not a directory"):
        ArrowStore(tmp_path / "file" / "below", SCHEMA).append([row("a")])
