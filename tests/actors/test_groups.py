"""What is said when an actor fails: the first cause, as soon as it is known."""

from __future__ import annotations

import os
import threading

import pytest

from actors import groups
from seqkd.errors import ActorError, ModelError
from seqkd.types import Prompt, Rollout


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


class Engine:
    """One that answers with the prompt's own id."""

    def sample(self, prompts, seeds, samples, max_tokens, temperature, top_p):
        return [
            Rollout(p.prompt_id, f"{p.prompt_id}/{seed}/{i}", p.token_ids, (1,), (0.0,), "student",
                    0, "length")
            for p, seed, n in zip(prompts, seeds, samples, strict=True)
            for i in range(n)
        ]  # fmt: skip


def test_completions_come_prompt_by_prompt_whatever_engine_drew_them(local_ray):
    engines = [local_ray.remote(Engine).options(num_cpus=0).remote() for _ in range(3)]
    prompts = [Prompt(str(i), (i,), "") for i in range(8)]
    samples = [2, 1, 3, 1, 1, 2, 4, 1]
    drawn = groups.RolloutGroup(engines, 1, None, "rollout").sample(prompts, samples, seed=0)
    expected = [str(i) for i, n in enumerate(samples) for _ in range(n)]
    assert [r.prompt_id for r in drawn] == expected
    assert len({r.sample_id.split("/")[1] for r in drawn}) == len(prompts), "a seed a prompt"
    for engine in engines:
        local_ray.kill(engine)
