"""Real runs whose processes are killed by signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import psutil

from tests.conftest import ROOT
from tests.fork_server import JOB_CONFIG

PATIENCE_S = 300


def test_a_short_schedule_of_kills_and_hangs(tiny_config, tmp_path):
    """tests/chaos/chaos.py checks that each prompt is trained on once, that versions and metrics
    have no gaps, that no process or partial file remains, and that the weights are bit-identical to
    those of an undisturbed run."""
    command = [sys.executable, "-m", "tests.chaos.chaos", str(tiny_config), "--kills=5", "--seed=5"]
    done = subprocess.run(
        [*command, "--directory", str(tmp_path / "chaos")],
        cwd=ROOT, capture_output=True, text=True, timeout=3 * PATIENCE_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "problems in total: 0" in done.stdout


def start(tiny_config, directory, *arguments):
    """Start the driver with its own Ray, as the leader of its process group, as in a terminal."""
    command = [
        *(sys.executable, "-m", "seqkd", "train", str(tiny_config)),
        *(f"runs_dir={directory}", "steps=500"),
    ]
    return subprocess.Popen(
        [*command, "evaluation.prompts=0", *arguments], cwd=ROOT, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={k: v for k, v in os.environ.items() if not k.startswith("RAY_") or k == JOB_CONFIG},
    )  # fmt: skip


def rows(run):
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def reach(process, run, steps):
    """Wait for a number of rows, and return all child processes of the driver."""
    until = time.monotonic() + PATIENCE_S
    while len(rows(run)) < steps:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < until, "no steps"
        time.sleep(0.1)
    return psutil.Process(process.pid).children(recursive=True)


def test_the_loss_of_the_own_cluster_is_reported_and_leaves_no_process(tiny_config, tmp_path):
    """Ray itself ends the driver after 60 s, without an error, and leaves its agents running."""
    run = tmp_path / "tiny"
    driver = start(tiny_config, tmp_path)
    processes = reach(driver, run, 2)
    (control,) = [p for p in processes if p.name() == "gcs_server"]
    control.kill()
    printed, _ = driver.communicate(timeout=PATIENCE_S)
    assert driver.returncode == 2, printed
    assert "Ray's control process (gcs_server) at 1" in printed
    assert "Traceback" not in printed
    assert psutil.wait_procs(processes, timeout=60)[1] == []


def test_a_killed_driver_leaves_no_process_and_ctrl_c_saves(tiny_config, tmp_path):
    run = tmp_path / "tiny"
    first = start(tiny_config, tmp_path)
    orphans = reach(first, run, 3)
    assert any("raylet" in " ".join(p.cmdline()) for p in orphans)
    first.kill()
    first.wait()

    second = start(tiny_config, tmp_path, "--resume")
    others = reach(second, run, len(rows(run)) + 2)
    refused = start(tiny_config, tmp_path, "--resume")
    assert "is in use by a running process" in refused.communicate(timeout=180)[0]
    assert refused.returncode == 2
    os.killpg(second.pid, signal.SIGINT)
    printed, _ = second.communicate(timeout=180)
    assert second.returncode == 128 + signal.SIGINT, printed
    assert printed.splitlines()[-1] == "stopped: by SIGINT; continue with --resume"
    assert "Traceback" not in printed
    saved = max((run / "checkpoints").iterdir())
    steps = json.loads((saved / "state.json").read_text())["step"]
    assert [row["step"] for row in rows(run)] == list(range(steps))
    assert steps >= 5
    assert not list(run.rglob("*.partial"))
    assert psutil.wait_procs(others, timeout=60)[1] == []
    # Ray's agents detect the loss of their node after about a minute.
    assert psutil.wait_procs(orphans, timeout=PATIENCE_S)[1] == []
