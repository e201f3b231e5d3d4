"""Fixtures: tiny random models and a local Ray, shared by all tests of a session."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests import fork_server

# Set before torch or Ray is imported: no hub, no accelerator, one thread per process.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
}

ROOT = Path(__file__).resolve().parent.parent

ANY_TIME = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("quick", max_examples=50, derandomize=True, **ANY_TIME)
settings.register_profile("long", max_examples=1500, print_blob=True, **ANY_TIME)
settings.load_profile("quick")  # --hypothesis-profile=long selects the other profile


def pytest_configure(config):
    """Choose the address of the fork server once, in the main test process."""
    if fork_server.ADDRESS not in os.environ:
        os.environ[fork_server.ADDRESS] = f"{tempfile.mkdtemp(prefix='fork-')}/{os.getpid()}"


def pytest_collection_finish(session):
    """Fork Ray's workers from a server process if the selected tests start Ray workers."""
    if {"actors", "chaos", "e2e"} & {item.path.parent.name for item in session.items}:
        fork_server.start(int(Path(os.environ[fork_server.ADDRESS]).name))
        command = " ".join(fork_server.python())
        job = {"runtime_env": {"py_executable": command}}
        os.environ[fork_server.JOB_CONFIG] = json.dumps(job)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Directories of a tiny teacher (4 layers) and student (2 layers), by name."""
    from scripts.tiny_models import write_tiny

    folder = tmp_path_factory.mktemp("models")
    return {
        "teacher": str(write_tiny(folder / "teacher", layers=4, seed=1)),
        "student": str(write_tiny(folder / "student", layers=2, seed=2)),
    }


@pytest.fixture(scope="session")
def tiny_config(tiny, tmp_path_factory):
    """File like configs/tiny.yaml, with these models and a teacher of kind hf, which starts
    faster."""
    import yaml

    data = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text())
    data["student"]["model"] = tiny["student"]
    data["teacher"] = {"kind": "hf", "model": tiny["teacher"], "generation": {"kv_cache_gib": 0.1}}
    for key in ("path", "heldout_path"):
        data["data"][key] = str(ROOT / data["data"][key])
    file = tmp_path_factory.mktemp("config") / "tiny.yaml"
    file.write_text(yaml.safe_dump(data))
    return file


@pytest.fixture(scope="session")
def tokenizer(tiny):
    from seqkd.models.loading import load_tokenizer

    return load_tokenizer(tiny["student"], "student.model")


@pytest.fixture(scope="session")
def local_ray():
    """Local Ray of this process, with enough CPU slots for the tests' actors."""
    import ray

    ray.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.fixture
def prompts(tokenizer):
    """Four prompts of different lengths."""
    from seqkd.types import Prompt

    texts = ("hello", "what is rain for?", "name three birds", "why")
    return [
        Prompt(text, tuple(tokenizer(text, add_special_tokens=False).input_ids), text)
        for text in texts
    ]
