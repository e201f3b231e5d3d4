"""Packages import only lower layers; seqkd imports no ray, vllm or deepspeed."""

from __future__ import annotations

import ast

import pytest

from tests.conftest import ROOT
from tests.import_graph import graph, layer, levels, upward

FORBIDDEN = {
    "seqkd": {"ray", "vllm", "deepspeed", "scripts"},
    "seqkd/objectives": {
        "ray",
        "vllm",
        "deepspeed",
        "actors",
        "scripts",
        "transformers",
        "pydantic",
    },
    "actors": {"scripts"},
}


def imported(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("package", FORBIDDEN)
def test_import_direction(package):
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        assert not FORBIDDEN[package] & set(imported(file)), file


def test_only_commands_import_actors():
    for file in (ROOT / "seqkd").rglob("*.py"):
        assert file.parent.name == "cli" or "actors" not in set(imported(file)), file


def test_every_module_has_a_layer():
    modules = set(graph(ROOT)) - {"seqkd", "seqkd.__main__"}
    assert [name for name in sorted(modules) if layer(name) is None] == []
    assert layer("seqkd.unknown") is None


def test_no_module_imports_the_root_package():
    """The root package imports the commands, which import everything."""
    assert not [name for name, below in graph(ROOT).items() if "seqkd" in below]


def test_no_package_imports_a_higher_layer():
    assert not upward(graph(ROOT))


def test_modules_do_not_import_each_other():
    assert levels(graph(ROOT))


def test_only_weight_sync_uses_the_reload_interface():
    for file in (ROOT / "actors").glob("*.py"):
        assert (file.name == "weight_sync.py") == ("reload_weights" in file.read_text()), file


def test_only_pool_waits_for_ray():
    for folder in ("actors", "seqkd"):
        for file in (ROOT / folder).rglob("*.py"):
            assert file.name == "pool.py" or "ray.get(" not in file.read_text(), file
