"""Checks of the files in docs/clusters.md that need no cluster."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest
import yaml

from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "clusters.md").read_text()
STUBS = {
    "srun": 'while [[ $1 == --* ]]; do shift; done; "$@"',
    "hostname": "echo 127.0.0.1",
    "scontrol": '[[ $1 == show ]] && echo one || echo "$*" > "$FOLDER/scontrol"',
    "ray": 'case $1 in start) sleep 600;; status) exit 0;; list) echo "[{}]";; esac',
    "python": '"$PYTHON" "$@"',
    "seqkd": 'echo "$RAY_AUTH_MODE $*" > "$FOLDER/run"\n'
    'cp "$RAY_AUTH_TOKEN_PATH" "$FOLDER/token"\n'
    'trap "sleep 1; exit 143" TERM; echo started; sleep 600 & wait; exit 1',
}  # fmt: skip


@pytest.fixture
def job(tmp_path):
    """The Slurm script with stand-ins for the programs that it calls, once the run has started."""
    script = next(b for b in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) if "#SBATCH" in b)
    activate = tmp_path / "seqkd" / ".venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.write_text("")
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    for name, body in STUBS.items():
        (stubs / name).write_text(f"#!/bin/bash\n{body}\n")
        (stubs / name).chmod(0o755)
    (tmp_path / "script").write_text(script.replace("/shared", str(tmp_path)))
    environment = os.environ | {
        "PATH": f"{stubs}:{os.environ['PATH']}",
        "FOLDER": str(tmp_path),
        "PYTHON": sys.executable,
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "one",
        "SLURM_CPUS_PER_TASK": "4",
    }
    process = subprocess.Popen(
        ["bash", str(tmp_path / "script"), "mine.yaml"], env=environment, text=True,
        stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    for line in process.stdout:
        if line == "started\n":
            break
    yield process, tmp_path
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_slurm_job_at_its_time_limit_checkpoints_and_is_requeued(job):
    process, folder = job
    assert (folder / "run").read_text().split() == [
        "token", "train", "mine.yaml", "cluster=127.0.0.1:6379",
        f"runs_dir={folder}/runs", "--resume",
    ]  # fmt: skip
    assert re.fullmatch(r"[0-9a-f]{64}\n", (folder / "token").read_text())
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143, "the exit code of the stopped run"
    assert (folder / "scontrol").read_text() == "requeue 7\n"
    assert not (folder / "tokens" / "7").exists()


def test_ray_up_accepts_the_cluster_file():
    from ray.autoscaler._private.util import prepare_config, validate_config

    files = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)]
    (cluster,) = [file for file in files if "cluster_name" in file]
    validate_config(prepare_config(cluster))


def test_ray_job_requests_token_authentication_and_the_installed_ray():
    import ray

    files = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)]
    (job,) = [file for file in files if file.get("kind") == "RayJob"]
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["rayVersion"] == ray.__version__
    pods = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for pod in (pod["template"]["spec"] for pod in pods):
        mounted = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
