"""Processes that take steps by turns, as the benchmark compares them."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil
import pytest

from scripts.benchmarks.rows import Row
from scripts.benchmarks.turns import Contender, all_else_stopped, contender
from seqkd.errors import ActorError

TAKES_TURNS = """
import sys
from scripts.benchmarks.turns import wait_for_turn
wait_for_turn()
for step in range(int(sys.argv[1])):
    print("step", step, file=open(sys.argv[2], "a"))
    wait_for_turn()
sys.exit("no more steps")
"""


@pytest.fixture
def start(tmp_path):
    """Start a process of so many steps, which writes each to a file."""
    started = []

    def contend(steps):
        errors, taken = tmp_path / f"{len(started)}.err", tmp_path / f"{len(started)}"
        process = subprocess.Popen(
            [sys.executable, "-c", TAKES_TURNS, str(steps), str(taken)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors.open("w"), text=True,
        )  # fmt: skip
        started.append(process)
        return Contender(process, errors), taken

    yield contend
    for process in started:
        process.communicate()


def test_a_step_is_taken_when_it_is_its_turn_and_not_before(start):
    we, ours = start(2)
    they, theirs = start(2)
    assert not ours.exists()
    for turn in (1, 2):
        assert we.step() > 0
        assert len(ours.read_text().splitlines()) == turn
        assert (len(theirs.read_text().splitlines()) if theirs.exists() else 0) == turn - 1
        assert they.step() > 0
    with pytest.raises(ActorError, match="no more steps"):
        we.step()


def test_without_anyone_to_give_it_a_turn_a_process_ends(start):
    we, ours = start(5)
    we.step()
    we.process.communicate()
    assert len(ours.read_text().splitlines()) == 1


def test_all_others_are_stopped_meanwhile_and_go_on_whatever_happens(start):
    (we, _), (they, _) = start(1), start(1)
    other = psutil.Process(we.process.pid)
    with pytest.raises(RuntimeError, match="in between"), all_else_stopped(they):
        os.waitid(os.P_PID, we.process.pid, os.WSTOPPED | os.WNOWAIT)
        assert other.status() == psutil.STATUS_STOPPED
        assert psutil.Process(they.process.pid).status() != psutil.STATUS_STOPPED
        raise RuntimeError("in between")
    assert other.status() != psutil.STATUS_STOPPED
    assert we.step() > 0


def test_a_process_that_never_gets_ready_says_why():
    with (
        pytest.raises(ActorError, match="No module named nothing"),
        contender("nothing", [], {}, {}),
    ):
        pass


def test_a_ratio_is_of_pairs():
    """Not of the two medians, which may be of different times."""
    row = Row("", "", "s", "")
    row.pairs([13, 20, 11], [20, 32, 22])
    assert row.ratio == 20 / 32
