"""The output of the quickstart."""

from __future__ import annotations

import asyncio
import sys
from types import SimpleNamespace

import pytest
from ray.job_submission import JobStatus

from scripts import quickstart
from seqkd.errors import ResourceError

RAY_LINE = "2026-11-30 23:00:00,123\tINFO job_manager.py:1 -- Runtime env is setting up.\n"


@pytest.fixture
def submit(monkeypatch):
    """Submit to a head that prints ``chunks`` and ends the job with ``status``."""
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "steps=1"])
    monkeypatch.setattr("logging.disable", lambda level: None)

    def run(chunks, status, code=None, message=""):
        class Client:
            def __init__(self, address):
                assert address == "http://head"

            def submit_job(self, entrypoint, runtime_env):
                assert entrypoint.endswith(" steps=1")
                return "raysubmit_1"

            async def tail_job_logs(self, job):
                for chunk in chunks:
                    if isinstance(chunk, Exception):
                        raise chunk
                    yield chunk

            def get_job_info(self, job):
                return SimpleNamespace(status=status, driver_exit_code=code, message=message)

        monkeypatch.setattr("ray.job_submission.JobSubmissionClient", Client)
        return asyncio.run(quickstart.submit("http://head"))

    return run


def test_lines_of_ray_are_hidden(submit, capsys):
    chunks = [
        RAY_LINE + "Running entrypoint for job raysubmit_1: python\n",
        "a\nmain 1/2  \033[1mx\n",
    ]
    assert submit(chunks, JobStatus.SUCCEEDED, 0) == 0
    assert capsys.readouterr() == ("submitted Ray job raysubmit_1\na\nmain 1/2  [1mx\n", "")


def test_lines_of_ray_are_printed_after_a_failure(submit, capsys):
    assert submit([RAY_LINE, "error: steps: is 0.\n"], JobStatus.FAILED, 2, "failed") == 2
    out, err = capsys.readouterr()
    assert out.endswith("error: steps: is 0.\n")
    assert RAY_LINE.replace("\t", "  ").split() == err.split()


def test_the_message_of_ray_is_printed_if_the_job_did_not_start(submit, capsys):
    assert submit([], JobStatus.FAILED, None, "no space left") == 1
    assert "no space left" in capsys.readouterr().err


def test_a_lost_connection_is_one_error(submit):
    with pytest.raises(ResourceError, match=r"Ray cannot run the job: gone"):
        submit([RAY_LINE, RuntimeError("gone")], JobStatus.RUNNING)
