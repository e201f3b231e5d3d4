"""Damaged and incomplete model files have one message before any process starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from seqkd.checks.preflight import check
from seqkd.cli.evaluate import Request, evaluate
from seqkd.config.run import Config
from seqkd.errors import ConfigError, ModelError
from seqkd.models.loading import load_causal_lm
from seqkd.models.model_files import checkpoint_digests, identify, model_files, parameter_files
from tests.conftest import ROOT
from tests.unit.config.test_config import MINIMAL

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
INCOMPLETE = "is not a complete safetensors file"


@pytest.fixture(scope="module")
def sharded(tiny, tmp_path_factory):
    """The tiny student in several files."""
    directory = tmp_path_factory.mktemp("sharded") / "model"
    shutil.copytree(tiny["student"], directory)
    (directory / WEIGHTS).unlink()
    load_causal_lm(tiny["student"], "float32", "m").save_pretrained(
        directory, max_shard_size="100KB"
    )
    assert len(list(directory.glob("*.safetensors"))) > 2
    return directory


def cut(size):
    return lambda file: file.write_bytes(file.read_bytes()[:size])


def replace_by(content):
    return lambda file: file.write_bytes(content)


def replace_by_directory(file):
    file.unlink()
    file.mkdir()


DAMAGE = {
    "empty weights": (WEIGHTS, cut(0), f"{INCOMPLETE}: header too small. It has 0 bytes."),
    "half of the header's size": (WEIGHTS, cut(4), INCOMPLETE),
    "header cut": (WEIGHTS, cut(100), f"{INCOMPLETE}: invalid header length. It has 100 bytes."),
    "body cut by a byte": (WEIGHTS, cut(-1), INCOMPLETE),
    "a byte too many": (WEIGHTS, lambda f: f.write_bytes(f.read_bytes() + b"x"), INCOMPLETE),
    "body cut at the header": (
        WEIGHTS,
        lambda f: cut(8 + int.from_bytes(f.read_bytes()[:8], "little"))(f),
        INCOMPLETE,
    ),
    "no safetensors": (WEIGHTS, replace_by(b"version https://git-lfs.github.com\n"), INCOMPLETE),
    "zeros": (WEIGHTS, replace_by(bytes(5000)), INCOMPLETE),
    "not a file": (WEIGHTS, replace_by_directory, "cannot be read: "),
    "config cut": ("config.json", cut(50), "is not a valid JSON file"),
    "config empty": ("config.json", cut(0), "is not a valid JSON file"),
    "tokenizer cut": ("tokenizer.json", cut(-10), "is not valid JSON: Expecting"),
    "tokenizer empty": ("tokenizer.json", cut(0), "is not valid JSON: Expecting value"),
    "tokenizer of random bytes": ("tokenizer.json", replace_by(b"\xff\xfe\xfd"), "not valid JSON"),
    "tokenizer config cut": ("tokenizer_config.json", cut(20), "is not valid JSON"),
    "generation config cut": ("generation_config.json", cut(20), "is not valid JSON"),
}


def config(**models):
    data = {"path": "tiny_train", "heldout_path": "tiny_heldout"}
    data = {key: str(ROOT / f"configs/data/{name}.jsonl") for key, name in data.items()}
    changes = {
        "data": data | {"max_prompt_tokens": 128},
        "student": {"model": models["student"]},
        "teacher": {"kind": "hf", "model": models["teacher"]},
        "evaluation": {"prompts": 2},
    }
    return Config.model_validate(MINIMAL | changes)


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file(tiny, tmp_path, role, damage):
    name, change, message = DAMAGE[damage]
    model = shutil.copytree(tiny[role], tmp_path / "copy")
    assert model_files(str(model), "m")
    change(model / name)
    with pytest.raises(ConfigError) as caught:
        check(config(**{**tiny, role: str(model)}))
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{role}.model: ") and message in line, line
    assert str(model / name) in line
    assert "again" in line or "Set it to a directory" in line


@pytest.mark.parametrize("damage", ["body cut by a byte", "header cut", "tokenizer cut"])
def test_a_damaged_student_is_not_evaluated(tiny, tmp_path, monkeypatch, damage):
    """Neither the run's configuration nor the command's checks load this model."""
    monkeypatch.setattr("actors.build.connect", lambda *_: pytest.fail("Ray was started"))
    name, change, message = DAMAGE[damage]
    model = shutil.copytree(tiny["student"], tmp_path / "copy")
    change(model / name)
    request = Request(config(**tiny), {"student": str(model)}, tmp_path / "out", None)
    with pytest.raises(ModelError, match=message.replace("(", r"\(")) as caught:
        evaluate(request, verbose=True)
    assert str(caught.value).startswith(f"student.model: {model / name} ")


def test_shards(sharded, tmp_path):
    assert {f.name for f in model_files(str(sharded), "m")} == {
        "chat_template.jinja", "config.json", "generation_config.json", "tokenizer.json",
        "tokenizer_config.json", INDEX, *(f.name for f in sharded.glob("*.safetensors")),
    }  # fmt: skip
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    assert parameter_files(str(sharded), "m") == {n: sharded / f for n, f in weight_map.items()}


def shards(model):
    return sorted(model.glob("*.safetensors"))


SHARDS = {
    "a shard is missing": (lambda m: shards(m)[1].unlink(), "does not exist, although"),
    "a shard is cut": (lambda m: cut(-1)(shards(m)[-1]), INCOMPLETE),
    "a shard is empty": (lambda m: cut(0)(shards(m)[0]), INCOMPLETE),
    "the index is cut": (lambda m: cut(50)(m / INDEX), "is not valid JSON"),
    "the index is empty": (lambda m: (m / INDEX).write_text("{}"), "has no weight_map"),
    "the index is a list": (lambda m: (m / INDEX).write_text("[1]"), "has no weight_map"),
    "the index lists nothing": (
        lambda m: (m / INDEX).write_text('{"weight_map": {}}'),
        "has no weight_map",
    ),
    "no weights": (
        lambda m: [f.unlink() for f in (*shards(m), m / INDEX)],
        "has no safetensors weights. Set it to",
    ),
}


@pytest.mark.parametrize("damage", SHARDS)
def test_damaged_shards(sharded, tmp_path, damage):
    model = shutil.copytree(sharded, tmp_path / "copy")
    change, message = SHARDS[damage]
    change(model)
    with pytest.raises(ModelError, match=message) as caught:
        model_files(str(model), "teacher.model")
    assert str(caught.value).startswith("teacher.model: ") and str(model) in str(caught.value)


def test_a_single_file_next_to_an_index_is_checked_and_identified(sharded, tiny, tmp_path):
    """transformers reads the single file, vLLM the shards."""
    model = shutil.copytree(sharded, tmp_path / "copy")
    shutil.copy(Path(tiny["student"]) / WEIGHTS, model)
    assert WEIGHTS in identify({"m": str(model)})["m"]["files"]
    cut(-1)(model / WEIGHTS)
    with pytest.raises(ModelError, match=INCOMPLETE):
        model_files(str(model), "m")


def test_files_that_no_run_reads_do_not_matter(tiny, tmp_path):
    model = shutil.copytree(tiny["student"], tmp_path / "copy")
    before = identify({"m": str(model)})
    for name in ("README.md", "results.json", "optimizer.pt", "other.safetensors"):
        (model / name).write_text("{")
    assert identify({"m": str(model)}) == before


def test_digests_do_not_depend_on_times_or_places(tiny, tmp_path):
    copy = shutil.copytree(tiny["student"], tmp_path / "copy", copy_function=shutil.copyfile)
    both = identify({"a": tiny["student"], "b": str(copy)})
    assert both["a"]["files"] == both["b"]["files"]
    assert set(both["a"]["files"]) >= {WEIGHTS, "config.json", "tokenizer.json"}


# --- hub models


@pytest.fixture
def hub(sharded, tmp_path, monkeypatch):
    """Snapshot of the hub model owner/name."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    home, commit = tmp_path / "models--owner--name", "0" * 40
    shutil.copytree(sharded, home / "snapshots" / commit)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    return home / "snapshots" / commit


def test_a_hub_model_on_this_machine(hub, sharded):
    files = model_files("owner/name", "m")
    assert {f.parent for f in files} == {hub}
    digests = identify({"m": "owner/name"})["m"]
    assert digests["model"] == "owner/name"
    assert digests["files"] == identify({"m": str(sharded)})["m"]["files"]
    cut(-1)(shards(hub)[0])
    with pytest.raises(ModelError, match=INCOMPLETE) as caught:
        model_files("owner/name", "m")
    assert str(shards(hub)[0]) in str(caught.value)


def test_a_hub_model_that_is_partly_on_this_machine(hub):
    """The rest of its files is downloaded when the run starts, which is impossible in the tests."""
    missing, *_ = shards(hub)
    missing.unlink()
    assert model_files("owner/name", "m") is None
    assert checkpoint_digests("owner/name", "m", download=False) is None
    with pytest.raises(ModelError, match=f"{missing.name} does not exist, although"):
        identify({"m": "owner/name"})
    cut(-1)(shards(hub)[0])
    with pytest.raises(ModelError, match=INCOMPLETE):
        model_files("owner/name", "m")


def test_a_hub_model_that_is_not_on_this_machine(hub):
    assert model_files("nobody/nothing", "m") is None
    with pytest.raises(ModelError, match="m: 'nobody/nothing' cannot be loaded: "):
        identify({"m": "nobody/nothing"})
