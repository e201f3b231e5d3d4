"""What is said when an actor fails: the first cause, as soon as it is known."""

from __future__ import annotations

import os
import threading

import pytest

from actors import groups
from seqkd.errors import ActorError, ModelError


class Worker:
    """One that fails in the ways in which actors do."""

    def refuse(self):
        raise ModelError("student.model: is none.")

    def fail(self):
        raise ConnectionError("connection closed by peer")

    def die(self):
        os._exit(1)

    def hang(self):
        threading.Event().wait()


@pytest.fixture
def workers(local_ray):
    started = [local_ray.remote(Worker).options(num_cpus=0).remote() for _ in range(2)]
    yield started
    for worker in started:
        local_ray.kill(worker)


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(groups, "SETTLE_S", 2.0)


def test_a_failure_does_not_wait_for_the_one_that_hangs(workers):
    with pytest.raises(ModelError, match=r"student\.model: is none\."):
        groups.wait([workers[0].hang.remote(), workers[1].refuse.remote()], "start")


def test_a_death_is_named_before_what_the_others_saw_of_it(workers):
    with pytest.raises(ActorError, match="learner step died"):
        groups.wait([workers[0].fail.remote(), workers[1].die.remote()], "learner step")


def test_a_defect_keeps_its_traceback(workers):
    with pytest.raises(ActorError) as caught:
        groups.wait(workers[0].fail.remote(), "teacher scoring")
    assert str(caught.value) == "teacher scoring failed: ConnectionError: connection closed by peer"
    assert "in fail" in caught.value.details
