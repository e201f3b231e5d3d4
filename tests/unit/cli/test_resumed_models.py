"""A run is only resumed with the models that it started with."""

from __future__ import annotations

import json
import os
import random
import shutil
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from seqkd.cli import train
from seqkd.cli.dry_run import dry_run
from seqkd.config.run import load
from seqkd.errors import ConfigError, SeqkdError
from seqkd.storage import run_directory

FLIPS = 4
"""Number of bits that are flipped per file."""
CHANGED = r"files of the models have changed since .*/run started"


@pytest.fixture
def start(tiny, tiny_config, tmp_path, monkeypatch):
    """Function that starts or resumes a run with copies of the tiny models, until the first actor
    would be started. Returns whether it came that far."""
    models = {name: shutil.copytree(path, tmp_path / name) for name, path in tiny.items()}
    reached = []
    monkeypatch.setattr("actors.build.connect", lambda *_: nullcontext())
    monkeypatch.setattr("actors.build.check_resources", lambda *_: None)
    monkeypatch.setattr(train, "learn", lambda *_: reached.append(True))

    def call(*overrides, resume=False):
        config = load(tiny_config, ["name=run", f"runs_dir={tmp_path}", *(
            f"{name}.model={path}" for name, path in models.items()
        ), *overrides])  # fmt: skip
        reached.clear()
        with run_directory.lock(tmp_path / "run"):
            train.check_and_learn(tmp_path / "run", config, resume, verbose=True)
        (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
        return bool(reached)

    return call


@contextmanager
def flipped(file, seed):
    """Flip one bit of a file. Its size and its times do not change."""
    content, times = file.read_bytes(), file.stat()
    changed = bytearray(content)
    generator = random.Random(seed)
    changed[generator.randrange(len(content))] ^= 1 << generator.randrange(8)

    def write(data):
        with file.open("r+b") as out:
            out.write(data)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))

    write(changed)
    try:
        yield
    finally:
        write(content)


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_flipped_bit(start, tmp_path, role, name):
    assert start()
    for seed in range(FLIPS):
        with flipped(tmp_path / role / name, seed), pytest.raises(SeqkdError) as caught:
            start(resume=True)
        assert f"{role}.model: {tmp_path / role / name} " in str(caught.value), seed
    assert start(resume=True)


@pytest.mark.parametrize("seed", range(FLIPS))
def test_a_flipped_bit_of_the_values(start, tmp_path, seed):
    """The header of the weights and their size are as before."""
    assert start()
    file = tmp_path / "teacher" / "model.safetensors"
    content = bytearray(file.read_bytes())
    body = 8 + int.from_bytes(content[:8], "little")
    content[random.Random(seed).randrange(body, len(content))] ^= 1
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=CHANGED) as caught:
        start(resume=True)
    assert str(caught.value).splitlines()[1:] == [
        f"  teacher.model: {file} has other content",
        "Restore these files, or choose a new name=….",
    ]


def test_missing_and_additional_files(start, tmp_path):
    assert start()
    (tmp_path / "student" / "generation_config.json").unlink()
    (tmp_path / "teacher" / "special_tokens_map.json").write_text("{}")
    with pytest.raises(ConfigError, match=CHANGED) as caught:
        start(resume=True)
    assert str(caught.value).splitlines()[1:-1] == [
        f"  student.model: {tmp_path}/student/generation_config.json is missing",
        f"  teacher.model: {tmp_path}/teacher/special_tokens_map.json is new",
    ]


def test_one_of_several_teachers(start, tiny, tmp_path):
    two = {"kind": "hf", "model": str(shutil.copytree(tiny["teacher"], tmp_path / "second"))}
    both = {"a": {"teacher": {"kind": "hf", "model": tiny["teacher"]}}, "b": {"teacher": two}}
    several = [f"teacher={json.dumps({'kind': 'multi', 'teachers': both})}"]
    assert start(*several, resume=True), "there is no run yet"
    with flipped(tmp_path / "second" / "model.safetensors", 0), pytest.raises(ConfigError) as error:
        start(*several, resume=True)
    assert "  teacher.teachers.b.teacher.model: " in str(error.value)


def test_a_dry_run_compares_the_models_too(start, tiny_config, tmp_path, capsys):
    assert start()
    config = load(Path(tmp_path / "run" / "config.yaml"))
    assert dry_run(config, resume=True) == 0
    with flipped(tmp_path / "student" / "model.safetensors", 0):
        assert dry_run(config, resume=True) == 2
    assert "student.model: " in "".join(capsys.readouterr().out.split("findings:")[-1])


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"student.model": {"files": 3}}', None])
def test_a_missing_or_damaged_record(start, tmp_path, content):
    assert start()
    (tmp_path / "run" / "models.json").unlink()
    if content is not None:
        (tmp_path / "run" / "models.json").write_text(content)
    with pytest.raises(ConfigError, match=r"models\.json, .* is missing or damaged"):
        start(resume=True)


def test_models_of_a_failed_start_may_be_corrected(start, tmp_path):
    assert start()
    (tmp_path / "run" / "metrics.jsonl").unlink()  # it failed before its first step
    with flipped(tmp_path / "student" / "model.safetensors", 0):
        assert start()
        assert start(resume=True)
