"""Mistakes that are reported before data is read or actors start."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from actors import build
from seqkd.cli.main import main
from seqkd.training import setup
from tests.conftest import ROOT


def refuse(*arguments, **options):
    raise AssertionError("the command continued")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.cpus=4096", "error: the run needs 4096 CPU cores, but this machine has"),
        ("cluster=127.0.0.1:1", "error: cluster: no Ray cluster answers at '127.0.0.1:1': "),
    ],
)
def test_training_finds_the_machine_or_cluster_first(
    tiny_config, tmp_path, monkeypatch, capsys, override, message
):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(setup, "check", refuse)
    assert main(["train", str(tiny_config), f"runs_dir={tmp_path}", override]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bart", "/nowhere"], "error: --bart: '/nowhere' does not exist"),
        (["--out", "FILE"], "cannot be written: File exists"),
        (["--bart", "BART"], "error: --bart: no prompt has a reference answer"),
    ],
)
def test_an_evaluation_starts_no_actors(
    tiny, tiny_config, tmp_path, monkeypatch, capsys, options, message
):
    file, prompts = tmp_path / "file", tmp_path / "prompts.jsonl"
    file.touch()
    prompts.write_text(json.dumps({"prompt": "Say yes."}) + "\n")
    monkeypatch.setattr(build, "connect", refuse)
    monkeypatch.setattr("seqkd.evaluation.bartscore.BartScorer.__init__", scorer)
    chosen = [{"FILE": str(file)}.get(option, option) for option in options]
    out = [] if "--out" in options else ["--out", str(tmp_path / "out")]
    arguments = ["--config", str(tiny_config), "--prompts", str(prompts), *out, *chosen]
    assert main(["evaluate", tiny["student"], *arguments]) == 2
    assert message in capsys.readouterr().err


def scorer(self, model):
    """Load no model. A missing one is refused as usual."""
    from seqkd.models.loading import read_config

    if model != "BART":
        read_config(model, "--bart")


@pytest.mark.parametrize("name", ["estimators", "toy_gaussians", "toy_linear"])
def test_scripts_report_errors_like_the_commands(name):
    command = [sys.executable, "-m", f"scripts.{name}", "--unknown"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.endswith("\nerror: unrecognized arguments: --unknown\n")
