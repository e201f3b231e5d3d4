"""Submit configs/quickstart.yaml as a Ray job to the local head, starting one if none answers."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import count
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RAY = str(Path(sys.executable).parent / "ray")
# Authentication by token is on for the head and for its clients.
ENVIRONMENT = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}


def main() -> int:
    """Exit code of the job. Arguments are passed on as overrides."""
    started = not head_answers()
    if started:
        start_head()
    try:
        runs = ROOT / "runs"
        command = [
            RAY,
            "job",
            "submit",
            "--working-dir",
            str(ROOT),
            "--",
            sys.executable,
            "scripts/train.py",
            "configs/quickstart.yaml",
            f"runs_dir={runs}",
            f"name={free_name(runs)}",
            *sys.argv[1:],
        ]
        return subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, check=False).returncode
    finally:
        if started:
            subprocess.run([RAY, "stop"], env=ENVIRONMENT, check=False, capture_output=True)


def head_answers() -> bool:
    """Whether a head's job server is there, on its usual port or at RAY_API_SERVER_ADDRESS."""
    listing = [RAY, "job", "list"]
    return (
        subprocess.run(listing, env=ENVIRONMENT, check=False, capture_output=True).returncode == 0
    )


def start_head() -> None:
    """A head of this machine's cores. Its job server is on loopback; Ray's own ports listen on
    every interface, behind the token."""
    print("starting a local Ray head", flush=True)
    token = [RAY, "get-auth-token", "--generate"]  # keeps the one that is there
    subprocess.run(token, env=ENVIRONMENT, check=True, capture_output=True)
    command = [
        RAY,
        "start",
        "--head",
        "--node-ip-address=127.0.0.1",
        "--dashboard-host=127.0.0.1",
        "--disable-usage-stats",
    ]
    done = subprocess.run(command, env=ENVIRONMENT, check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: ray start failed:\n{done.stdout}{done.stderr}")


def free_name(runs: Path) -> str:
    """quickstart, or quickstart-2, … where that is taken."""
    names = ("quickstart" if i == 1 else f"quickstart-{i}" for i in count(1))
    return next(name for name in names if not (runs / name).exists())


if __name__ == "__main__":
    sys.exit(main())
