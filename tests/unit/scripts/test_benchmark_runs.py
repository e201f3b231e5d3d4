"""Training processes that take steps alternately, as the benchmark compares them."""

from __future__ import annotations

import time

import psutil
import pytest

from scripts.benchmarks.rows import Row
from scripts.benchmarks.runs import Training
from seqkd.errors import ActorError

TAKES_STEPS = """
import subprocess, sys, time
child = subprocess.Popen(["sleep", "60"])
file = open(sys.argv[1], "a", buffering=1)
for step in range(int(sys.argv[2])):
    time.sleep(0.1)
    file.write("{}\\n")
child.kill()
sys.exit("no more steps")
"""


@pytest.fixture
def start(tmp_path):
    """Return a function that starts a process with a child, which takes a given number of steps."""
    started = []

    def launch(steps):
        file = tmp_path / str(len(started))
        training = Training(["-c", TAKES_STEPS, str(file), str(steps)], file, {}, tmp_path)
        started.append(training)
        return training

    yield launch
    for training in started:
        training.stop()


def wait_until_stopped(training, stopped=(True, True)):
    """Wait until the process and its child are stopped, or not: a signal takes effect later."""
    (child,) = training.process.children()
    end = time.monotonic() + 30
    while tuple(p.status() == psutil.STATUS_STOPPED for p in (training.process, child)) != stopped:
        assert time.monotonic() < end


def test_a_paused_process_takes_no_step_until_its_turn(start):
    first = start(50)
    first.next_step()
    first.pause()
    wait_until_stopped(first)
    completed = first.completed()
    second = start(50)
    for _ in range(3):
        second.next_step()
    assert first.completed() == completed
    second.pause()
    taken = second.completed()
    assert first.turn() > 0
    assert completed < first.completed() < 50
    wait_until_stopped(first)
    assert second.completed() == taken
    first.resume()
    wait_until_stopped(first, (False, False))


def test_a_process_that_ends_reports_why(start):
    training = start(1)
    training.next_step()
    with pytest.raises(ActorError, match="no more steps"):
        training.finish()
    with pytest.raises(ActorError, match="no more steps"):
        training.next_step()


def test_a_module_that_is_missing_is_reported(tmp_path):
    with (
        pytest.raises(ActorError, match="No module named nothing"),
        Training(["-m", "nothing"], tmp_path / "steps", {}, tmp_path) as training,
    ):
        training.next_step()


def test_a_paused_process_ends_with_an_error_of_its_block(tmp_path):
    command = ["-c", TAKES_STEPS, str(tmp_path / "steps"), "500"]
    with (
        pytest.raises(RuntimeError, match="in between"),
        Training(command, tmp_path / "steps", {}, tmp_path) as training,
    ):
        training.next_step()
        training.pause()
        raise RuntimeError("in between")
    assert training.completed() < 500
    assert not psutil.pid_exists(training.process.pid)


def test_the_memory_of_processes_is_measured_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("SEQKD_PROCESS", "learner 0")
    code = "import sys, time; time.sleep(1.2); open(sys.argv[1], 'w').write('{}\\n')"
    with Training(["-c", code, str(tmp_path / "s")], tmp_path / "s", {}, tmp_path) as training:
        training.next_step()
        training.finish()
    assert 0 < training.memory("learner 0") < 1


def test_a_ratio_is_the_median_of_pairs_not_the_ratio_of_medians():
    row = Row("", "", "s", "")
    row.extend([13, 20, 11], [20, 32, 22])
    assert row.ratio == 20 / 32
