"""Imports of large libraries: cost, and what each process imports."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

import pytest

from seqkd.imports import importing
from tests.conftest import ROOT


@pytest.fixture
def collections():
    """Collections of the garbage collector since the start of the test."""
    seen = []
    gc.callbacks.append(lambda phase, info: seen.append(phase))
    yield seen
    gc.callbacks.pop()
    gc.unfreeze()


def allocate():
    return [[] for _ in range(10 * gc.get_threshold()[0])]


@pytest.mark.parametrize("freeze", [False, True])
def test_an_import_is_not_interrupted_by_collections(collections, freeze):
    before = gc.get_freeze_count()
    with importing(freeze):
        kept = allocate()
        assert not collections
    assert gc.isenabled() and (gc.get_freeze_count() >= before + len(kept)) == freeze
    oldest = {id(item) for item in gc.get_objects(generation=2)}
    assert (id(kept) in oldest) != freeze, "not in the generations that are searched often"
    assert id(kept) not in {id(item) for g in (0, 1) for item in gc.get_objects(generation=g)}
    allocate()
    assert collections


def test_collections_stay_as_they_were():
    gc.disable()
    try:
        with importing():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
    with pytest.raises(ImportError), importing():
        raise ImportError
    assert gc.isenabled()


LEARNER = """
import socket, sys
from actors.learner import LearnerRank
from seqkd.config.learner import LearnerConfig

rank = LearnerRank(LearnerConfig())
rank.listener = socket.create_server(("127.0.0.1", 0))
rank.start(0, rank.listener.getsockname(), sys.argv[1], {})
print(*sys.modules)
"""


def test_a_learner_imports_no_engine_and_no_compiler(tiny):
    """The process is not forked from the tests' server, which has imported everything."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", LEARNER, tiny["student"]],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    modules = set(done.stdout.splitlines()[-1].split())
    assert "deepspeed" in modules
    assert not {"vllm", "ray", "torch._inductor.compile_fx"} & modules
