"""Submit configs/quickstart.yaml as a Ray job to the local head, starting one if none answers."""

from __future__ import annotations

import subprocess
import sys
from itertools import count
from pathlib import Path

from actors.local_cluster import ENVIRONMENT, RAY, local_head
from seqkd.console import run_command

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Return the exit code of the job. Arguments are passed on as overrides."""
    if head_answers():
        return submit([])
    print("starting a local Ray head", flush=True)
    with local_head(ENVIRONMENT) as head:
        return submit(["--address", head.jobs])


def submit(options: list[str]) -> int:
    """Run the quickstart as a job, print its output and return its exit code."""
    runs = ROOT / "runs"
    command = [
        *(RAY, "job", "submit", *options, "--working-dir", str(ROOT), "--"),
        *(sys.executable, "scripts/train.py", "configs/quickstart.yaml"),
        *(f"runs_dir={runs}", f"name={free_name(runs)}", *sys.argv[1:]),
    ]
    return subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, check=False).returncode


def head_answers() -> bool:
    """Return whether a job server answers, on its usual port or at RAY_API_SERVER_ADDRESS."""
    listing = [RAY, "job", "list"]
    return (
        subprocess.run(listing, env=ENVIRONMENT, check=False, capture_output=True).returncode == 0
    )


def free_name(runs: Path) -> str:
    """Return quickstart, or quickstart-2, … if that name is taken."""
    names = ("quickstart" if i == 1 else f"quickstart-{i}" for i in count(1))
    return next(name for name in names if not (runs / name).exists())


if __name__ == "__main__":
    sys.exit(run_command(main))
