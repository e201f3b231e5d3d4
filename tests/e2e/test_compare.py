"""A comparison of real runs that is stopped, resumed and reported."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import psutil
import yaml

from tests.conftest import ROOT

AMOUNT = 1100


def command(file):
    return [sys.executable, "-m", "seqkd", "compare", str(file), "--jobs", "2"]


def rows(directory):
    file = directory / "metrics.jsonl"
    return file.read_text().splitlines() if file.exists() else []


def test_a_stopped_comparison_is_resumed_and_reported(tiny_config, tmp_path):
    runs = tmp_path / "runs" / "some"
    file = tmp_path / "some.yaml"
    comparison = {
        "name": "some",
        "config": str(tiny_config),
        "budget": {"kind": "sampled_tokens", "amount": AMOUNT},
        "seeds": [3],
        "methods": {"sequence": [], "teacher": ["sampler=teacher"]},
        "runs_dir": str(tmp_path / "runs"),
    }
    file.write_text(yaml.safe_dump(comparison, sort_keys=False))
    first = subprocess.Popen(
        command(file), cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    until = time.monotonic() + 300
    while not rows(runs / "sequence-3"):
        assert first.poll() is None and time.monotonic() < until
        time.sleep(0.1)
    children = psutil.Process(first.pid).children(recursive=True)
    first.send_signal(signal.SIGTERM)
    output, _ = first.communicate(timeout=180)
    assert first.returncode == 128 + signal.SIGTERM, output
    assert "stopped: by SIGTERM; run the same command again to continue" in output
    assert not [child for child in children if child.is_running()], "a run is still running"
    before = rows(runs / "sequence-3")
    assert (runs / "sequence-3" / "checkpoints").is_dir()

    done = subprocess.run(command(file), cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert rows(runs / "sequence-3")[: len(before)] == before
    assert "resuming after step" in (runs / "sequence-3.log").read_text()
    result = json.loads((runs / "comparison.json").read_text())
    for method in ("sequence", "teacher"):
        (run,) = result["runs"][method].values()
        costs = [json.loads(row)["sampled_tokens"] for row in rows(runs / f"{method}-3")]
        assert run["state"] == "finished" and run["steps"] == len(costs)
        assert sum(costs[:-1]) < AMOUNT <= sum(costs) == run["sampled_tokens"]
    (held_out,) = result["tables"].values()
    assert list(held_out["figures"]) == ["(teacher)", "(before)", "sequence", "teacher"]
    for method, at in (("(before)", "initial"), ("teacher", "main")):
        directory = runs / f"{'teacher' if method == 'teacher' else 'sequence'}-3"
        figures = json.loads((directory / "evaluation.json").read_text())["figures"][at]
        shown = held_out["figures"][method]
        assert shown.keys() == figures.keys() - {"teacher_length", "teacher_eos_rate"}
        for figure in shown:
            assert shown[figure]["mean"] == figures[figure]["mean"]
    assert "one seed: not tested" in done.stdout
    assert "methods" not in done.stderr

    again = subprocess.run(command(file), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    tables = [p.stdout.partition("mean over seeds")[2] for p in (again, done)]
    assert tables[0] and tables[0] == tables[1], "no run is repeated"
