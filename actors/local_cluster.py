"""Ray head on this machine, for the quickstart, benchmarks and tests."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import indent

from seqkd.errors import ResourceError

RAY = str(Path(sys.executable).parent / "ray")
ENVIRONMENT = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
"""Environment for a head and its clients: token authentication on, usage statistics off."""


@dataclass(frozen=True)
class Head:
    """Addresses of a Ray head."""

    cluster: str
    """host:port, for `ray.init`."""
    jobs: str
    """URL of the job server, for `ray job submit`."""


@contextmanager
def local_head(environment: Mapping[str, str], *options: str) -> Iterator[Head]:
    """Run a Ray head for the duration of the block. ``options`` are passed to ``ray start``.

    The head uses free ports, so it does not interfere with another Ray on this machine. The job
    server listens on loopback only. Ray's other ports listen on all interfaces and require the
    token. Raises ResourceError if the head does not start.
    """
    token = [RAY, "get-auth-token", "--generate"]  # an existing token is kept
    subprocess.run(token, env=environment, check=True, capture_output=True)
    cluster, jobs, client = free_ports(3)
    # A short path, because the paths of sockets have a length limit.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        command = [
            *(RAY, "start", "--head", "--block", "--disable-usage-stats"),
            *("--node-ip-address=127.0.0.1", f"--port={cluster}"),
            *("--dashboard-host=127.0.0.1", f"--dashboard-port={jobs}"),
            f"--ray-client-server-port={client}",
            # The default port of the job agent is fixed, so a second Ray could not use it.
            "--dashboard-agent-listen-port=0",
            # With a shared directory, a job would run in the Ray that was started last.
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
                raise ResourceError(f"ray start failed:\n{indent(printed, '  ')}")
            yield Head(f"127.0.0.1:{cluster}", f"http://127.0.0.1:{jobs}")
        finally:
            process.terminate()
            process.wait()


def free_ports(number: int) -> list[int]:
    """Return ``number`` different free TCP ports on loopback."""
    sockets = [socket.socket() for _ in range(number)]
    try:
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in sockets]
    finally:
        for probe in sockets:
            probe.close()
