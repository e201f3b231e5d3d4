"""The newest complete checkpoint is found after kills, damage and full disks."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import subprocess
import sys
import time

import pytest
import xxhash

from seqkd.errors import CheckpointError, StorageError
from seqkd.storage.checkpoint_dir import load_state, newest, save
from tests.conftest import ROOT

STATE = {"step": 3, "loss": math.inf, "name": "ä"}


def content(name, step, size):
    return random.Random(f"{name} {step}").randbytes(size)


def put(root, step, keep_last=9, size=1000):
    """Save a checkpoint whose file content depends on the step."""

    def write(directory):
        for name in ("weights.bin", "optimizer/rank0.bin", "optimizer/rank1.bin"):
            file = directory / name
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(content(name, step, size))

    return save(root, step, write, {"step": step}, keep_last)


def assert_whole(path, state, size=1000):
    for name in ("weights.bin", "optimizer/rank0.bin", "optimizer/rank1.bin"):
        assert (path / name).read_bytes() == content(name, state["step"], size), name


def names(root):
    return sorted(path.name for path in root.iterdir())


def test_a_checkpoint_is_read_back_with_its_state(tmp_path):
    root = tmp_path / "runs" / "checkpoints"
    path = save(root, 10, lambda d: (d / "w").write_bytes(b"abc"), STATE, 1)
    assert path == root / "step-00000010"
    assert newest(root) == (path, STATE, [])
    assert load_state(path) == STATE
    assert sorted(p.name for p in path.iterdir()) == ["manifest.json", "state.json", "w"]
    manifest = json.loads((path / "manifest.json").read_text())
    assert sorted(manifest) == ["state.json", "w"]
    assert manifest["w"] == {"bytes": 3, "xxh3": "78af5f94892f3950"}  # of XXH3_64bits("abc")


def test_directory_without_checkpoints(tmp_path):
    (tmp_path / "notes").touch()
    for root in (tmp_path, tmp_path / "missing"):
        assert newest(root) == (None, {}, [])
    with pytest.raises(CheckpointError, match=r"notes: cannot be read"):  # like missing permissions
        newest(tmp_path / "notes")


def test_last_checkpoints_are_kept(tmp_path):
    for step in (2, 4, 6, 100_000_000, 7):
        put(tmp_path, step, keep_last=2)
    assert names(tmp_path) == ["step-00000006", "step-00000007", "step-100000000"]
    path, state, _ = newest(tmp_path)
    assert (path.name, state) == ("step-100000000", {"step": 100_000_000})


def test_leftovers_of_killed_processes_are_removed(tmp_path):
    put(tmp_path, 2)
    (tmp_path / "step-00000003.partial").mkdir()
    (tmp_path / "step-00000004.partial" / "optimizer").mkdir(parents=True)
    shutil.copytree(tmp_path / "step-00000002", tmp_path / "step-00000002.old")
    put(tmp_path, 4)
    assert names(tmp_path) == ["step-00000002", "step-00000004"]


DAMAGES = {
    "unfinished": lambda p: p.rename(p.with_suffix(".partial")),
    "no manifest": lambda p: (p / "manifest.json").unlink(),
    "manifest is not JSON": lambda p: (p / "manifest.json").write_bytes(b"\xff{"),
    "manifest is nested": lambda p: (p / "manifest.json").write_text("[" * 200_000),
    "manifest is empty": lambda p: (p / "manifest.json").write_text("{}"),
    "manifest is a list": lambda p: (p / "manifest.json").write_text('["state.json"]'),
    "manifest is a directory": lambda p: ((p / "manifest.json").unlink(),
                                          (p / "manifest.json").mkdir()),
    "manifest lists another file": lambda p: name_in_manifest(p, "../../\0", {}),
    "file missing": lambda p: (p / "optimizer/rank1.bin").unlink(),
    "file cut": lambda p: (p / "weights.bin").write_bytes((p / "weights.bin").read_bytes()[:-1]),
    "bit flipped": lambda p: flip(p / "optimizer/rank0.bin"),
    "state missing": lambda p: (p / "state.json").unlink(),
    "state damaged": lambda p: flip(p / "state.json"),
    "no directory": lambda p: (shutil.rmtree(p), p.touch()),
}  # fmt: skip


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def name_in_manifest(path, name, value):
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, name: value}))


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
def test_damaged_checkpoint_is_skipped_with_a_reason(tmp_path, damage):
    put(tmp_path, 5)
    damage(put(tmp_path, 10))
    path, state, (line,) = newest(tmp_path)
    assert (path, state) == (tmp_path / "step-00000005", {"step": 5})
    assert line.startswith(f"{tmp_path}/step-00000010")
    assert "\n" not in line


@pytest.mark.parametrize("text", ["[1]", "not JSON"])
def test_invalid_state_with_a_valid_digest_is_skipped(tmp_path, text):
    put(tmp_path, 5)
    state = put(tmp_path, 10) / "state.json"
    state.write_text(text)
    as_written = {"bytes": len(text), "xxh3": xxhash.xxh3_64_hexdigest(text.encode())}
    name_in_manifest(state.parent, "state.json", as_written)
    path, _, (line,) = newest(tmp_path)
    assert path.name == "step-00000005"
    assert "step-00000010: state.json is damaged" in line


def test_existing_step_is_replaced(tmp_path):
    put(tmp_path, 3, size=500)
    flip(put(tmp_path, 6) / "weights.bin")
    path = put(tmp_path, 6)
    assert newest(tmp_path) == (path, {"step": 6}, [])
    assert_whole(path, {"step": 6})
    assert names(tmp_path) == ["step-00000003", "step-00000006"]


def test_damaged_later_checkpoint_does_not_evict_earlier_ones(tmp_path):
    put(tmp_path, 5)
    flip(put(tmp_path, 10) / "weights.bin")
    path = put(tmp_path, 6, keep_last=1)
    assert newest(tmp_path)[0] == path
    assert names(tmp_path) == ["step-00000006", "step-00000010"]


def test_kill_between_the_two_renames_of_a_replacement(tmp_path, monkeypatch):
    put(tmp_path, 3)
    put(tmp_path, 6, size=500)
    real = os.rename

    def killed(source, target, **kwargs):
        if str(target).endswith("step-00000006"):
            os._exit(9)
        real(source, target, **kwargs)

    monkeypatch.setattr("os.rename", killed)
    child = os.fork()
    if not child:
        put(tmp_path, 6)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    monkeypatch.undo()
    assert names(tmp_path) == ["step-00000003", "step-00000006.old", "step-00000006.partial"]
    path, state, skipped = newest(tmp_path)
    assert (path.name, state, skipped) == ("step-00000006.old", {"step": 6}, [])
    assert_whole(path, state, 500)
    put(tmp_path, 9, keep_last=2)
    assert names(tmp_path) == ["step-00000006.old", "step-00000009"]


SAVER = """
import resource, signal, sys
from pathlib import Path
from tests.unit.storage.test_checkpoint_dir import put
root, first, limit = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
if limit:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
for number in range(first, first + 10**6):
    step = number // 2  # each step is saved twice, so it replaces itself
    put(root, step, keep_last=2, size=300_000)
    print(step, flush=True)
"""


def saver(root, first=0, limit=0):
    return subprocess.Popen([sys.executable, "-c", SAVER, str(root), str(first), str(limit)],
                            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True)  # fmt: skip


def test_killed_save_loses_no_checkpoint(tmp_path):
    moments, last = random.Random(0), 0
    for _ in range(12):
        with saver(tmp_path, 2 * last) as process:
            saved = [int(process.stdout.readline()) for _ in range(moments.randint(1, 4))]
            time.sleep(moments.uniform(0, 0.015))  # anywhere within a save
            process.kill()
            saved += map(int, process.stdout.read().split())
        path, state, _ = newest(tmp_path)
        assert saved[-1] <= state["step"] <= saved[-1] + 1
        assert_whole(path, state, 300_000)
        last = state["step"]
    assert last >= 5
    put(tmp_path, last + 1, keep_last=2)
    assert len(names(tmp_path)) == 2


def test_write_error_raises_and_keeps_earlier_checkpoints(tmp_path):
    path = put(tmp_path, 5)
    with saver(tmp_path, first=20, limit=200_000) as process:
        _, errors = process.communicate()
    last = errors.strip().splitlines()[-1]
    assert last.startswith("seqkd.errors.StorageError") and "step-00000010: cannot be" in last
    assert "File too large. Previously saved files are kept. Free disk" in last
    assert names(tmp_path) == ["step-00000005"]
    assert newest(tmp_path) == (path, {"step": 5}, [])


@pytest.fixture
def small_disk(tmp_path):
    """File system of one MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting requires root")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_full_disk_raises_and_keeps_earlier_checkpoints(small_disk):
    path = put(small_disk, 5, size=100_000)
    with pytest.raises(StorageError, match=r"No space left on device\. Previously saved files"):
        put(small_disk, 10, size=300_000)
    assert names(small_disk) == ["step-00000005"]
    assert newest(small_disk) == (path, {"step": 5}, [])
    assert put(small_disk, 11, size=100_000) == newest(small_disk)[0]


@pytest.mark.parametrize("writer", ["torch", "safetensors"])
def test_full_disk_errors_of_libraries(small_disk, writer):
    import torch
    from safetensors.torch import save_file

    tensors = {"a": torch.zeros(1_000_000)}
    write = {"torch": lambda d: torch.save(tensors, d / "a.pt"),
             "safetensors": lambda d: save_file(tensors, d / "a.safetensors")}[writer]  # fmt: skip
    with pytest.raises(StorageError, match=r"step-00000001: cannot be written: .*Free disk space"):
        save(small_disk, 1, write, {}, 1)
    assert names(small_disk) == []


def test_other_errors_propagate_and_leave_no_files(tmp_path):
    def write(directory):
        (directory / "half").touch()
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        save(tmp_path, 1, write, {}, 1)
    assert names(tmp_path) == []
