"""Run configs/quickstart.yaml as a Ray job on the local head. Starts a head if none answers."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shlex
import subprocess
import sys
from itertools import count
from pathlib import Path

from actors.local_cluster import ENVIRONMENT, RAY, local_head
from seqkd.console import run_command, show
from seqkd.errors import ResourceError
from seqkd.escaping import as_json

ROOT = Path(__file__).resolve().parent.parent
RAY_LINE = re.compile(r"\d{4}-\d\d-\d\d .*\t(INFO|WARNING) |Running entrypoint for job ")
"""Start of the lines that Ray itself writes into the output of a job."""


def main() -> int:
    """Return the exit code of the job. Arguments are passed on as overrides."""
    os.environ.update(ENVIRONMENT)  # before `import ray`, which reads the authentication mode
    if head_answers():
        return asyncio.run(submit(None))
    show("starting a local Ray head")
    with local_head(ENVIRONMENT) as head:
        return asyncio.run(submit(head.jobs))


async def submit(address: str | None) -> int:
    """Run the quickstart as a job, print its output and return its exit code. Ray's own lines are
    printed only if the job fails."""
    from ray.job_submission import JobStatus, JobSubmissionClient

    logging.disable(logging.WARNING)  # the client's notices; Ray resets the levels of its loggers
    runs = ROOT / "runs"
    overrides = [f"runs_dir={as_json(str(runs))}", f"name={free_name(runs)}", *sys.argv[1:]]
    command = [sys.executable, "scripts/train.py", "configs/quickstart.yaml", *overrides]
    hidden, printed = "", False
    try:
        client = JobSubmissionClient(address)
        job = client.submit_job(
            entrypoint=shlex.join(command), runtime_env={"working_dir": str(ROOT)}
        )
        show(f"submitted Ray job {job}")
        async for chunk in client.tail_job_logs(job):
            for line in chunk.splitlines():
                if RAY_LINE.match(line):
                    hidden += f"{line}\n"
                else:
                    show(line)
                    printed = True
        info = client.get_job_info(job)
    except (RuntimeError, ConnectionError) as error:
        raise ResourceError(f"Ray cannot run the job: {error}\n  {hidden}") from error
    if info.status == JobStatus.SUCCEEDED:
        return 0
    show((hidden + ("" if printed else str(info.message))).rstrip(), file=sys.stderr)
    return max(1, info.driver_exit_code or 0)


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
