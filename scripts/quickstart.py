"""Submit configs/quickstart.yaml as a Ray job to the local head, starting one if none answers."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RAY = str(Path(sys.executable).parent / "ray")
# Authentication by token is on for the head and for its clients.
ENVIRONMENT = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}


@dataclass(frozen=True)
class Head:
    """Where a Ray head answers."""

    cluster: str
    """host:port, for `ray.init`."""
    jobs: str
    """URL of the job server, for `ray job submit`."""


def main() -> int:
    """Exit code of the job. Arguments are passed on as overrides."""
    if head_answers():
        return submit([])
    print("starting a local Ray head", flush=True)
    with local_head(ENVIRONMENT) as head:
        return submit(["--address", head.jobs])


def submit(options: list[str]) -> int:
    """Run the quickstart as a job and show its output."""
    runs = ROOT / "runs"
    command = [
        *(RAY, "job", "submit", *options, "--working-dir", str(ROOT), "--"),
        *(sys.executable, "scripts/train.py", "configs/quickstart.yaml"),
        *(f"runs_dir={runs}", f"name={free_name(runs)}", *sys.argv[1:]),
    ]
    return subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, check=False).returncode


def head_answers() -> bool:
    """Whether a head's job server is there, on its usual port or at RAY_API_SERVER_ADDRESS."""
    listing = [RAY, "job", "list"]
    return (
        subprocess.run(listing, env=ENVIRONMENT, check=False, capture_output=True).returncode == 0
    )


@contextmanager
def local_head(environment: Mapping[str, str], *options: str) -> Iterator[Head]:
    """A head of this machine's cores while the block runs, on free ports, so that no other Ray of
    the machine is in its way or stopped with it. Its job server is on loopback; Ray's own ports
    listen on every interface, behind the token."""
    token = [RAY, "get-auth-token", "--generate"]  # keeps the one that is there
    subprocess.run(token, env=environment, check=True, capture_output=True)
    cluster, jobs, client = free_ports(3)
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:  # sockets: a short path
        command = [
            *(RAY, "start", "--head", "--block", "--disable-usage-stats"),
            *("--node-ip-address=127.0.0.1", f"--port={cluster}"),
            *("--dashboard-host=127.0.0.1", f"--dashboard-port={jobs}"),
            f"--ray-client-server-port={client}",
            # Ray's own choice for the agent that takes jobs is fixed: a second Ray would have none.
            "--dashboard-agent-listen-port=0",
            # Where all share one, a job runs in the Ray of this machine that was started last.
            f"--temp-dir={folder}",
            *options,
        ]
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            printed = ""
            for line in process.stdout or ():
                printed += line
                if "Ray runtime started" in line:
                    break
            else:
                sys.exit(f"error: ray start failed:\n{printed}")
            yield Head(f"127.0.0.1:{cluster}", f"http://127.0.0.1:{jobs}")
        finally:
            process.terminate()
            process.wait()


def free_ports(number: int) -> list[int]:
    """Ports of this machine on which nothing listens."""
    sockets = [socket.socket() for _ in range(number)]
    try:
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in sockets]
    finally:
        for probe in sockets:
            probe.close()


def free_name(runs: Path) -> str:
    """quickstart, or quickstart-2, … where that is taken."""
    names = ("quickstart" if i == 1 else f"quickstart-{i}" for i in count(1))
    return next(name for name in names if not (runs / name).exists())


if __name__ == "__main__":
    sys.exit(main())
