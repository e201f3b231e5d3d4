"""Sampling ahead of the learner: overlap, staleness, and resuming after an interruption at any
call."""

from __future__ import annotations

import signal
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import pytest

from seqkd.config.lifecycle import RecoveryConfig
from seqkd.config.run import Config
from seqkd.errors import ActorError, LearnerLost, Stopped
from seqkd.training import feed, rollouts
from seqkd.training.control import Control
from tests.unit.config.test_config import MINIMAL
from tests.unit.training.test_recovery import CONFIG, Crash, World, left

STALE = Config.model_validate(
    CONFIG.model_dump(mode="json")
    | {
        "placement": "split",
        # Four of the six completions of a draw are scored while others are sampled.
        "teacher": {"kind": "hf", "model": "b", "scores": "logprobs", "batch_tokens": 2000},
        "rollout": {"samples_per_prompt": 2, "max_off_policy_steps": 1},
        "steps": 4,
        "updates_per_rollout": 1,
        "extra_terms": [],
        "warmup": {"sampler": "teacher", "steps": 2, "prompts_per_step": 2},
        "checkpoints": {"every_steps": 2, "keep_last": 2},
    }
)


class AtOnce:
    """Thread pool that runs work on submission, so that the order of calls is fixed."""

    def __init__(self, threads):
        pass

    def submit(self, work, *arguments):
        done = Future()
        done.set_result(work(*arguments))
        return done

    def shutdown(self, cancel_futures=False):
        pass


@pytest.fixture
def in_order(monkeypatch):
    for module in (feed, rollouts):
        monkeypatch.setattr(module, "ThreadPoolExecutor", AtOnce)


def versions(directory):
    return [(row["rollout_policy_version"], row["policy_version"]) for row in left(directory)[0]]


def test_the_student_that_samples_is_one_draw_behind(tmp_path):
    """This holds from the second draw of a phase on. Teacher samples have no student version."""
    World(tmp_path, config=STALE).finish()
    assert versions(tmp_path)[:2] == [(0, 0), (0, 1)]
    assert versions(tmp_path)[2:] == [(2, 2), (2, 3), (3, 4), (4, 5)]


def test_with_several_updates_per_draw_the_student_is_as_many_versions_behind(tmp_path):
    config = Config.model_validate(
        STALE.model_dump(mode="json") | {"updates_per_rollout": 2, "steps": 6, "warmup": None}
    )
    World(tmp_path, config=config).finish()
    assert versions(tmp_path) == [(0, 0), (0, 1), (0, 2), (0, 3), (2, 4), (2, 5)]


@pytest.mark.parametrize("overlaps", [True, False])
def test_sampling_overlaps_with_the_learner(tmp_path, overlaps):
    """With overlap, steps of the learner wait here until the next draw is sampled."""
    changes = {} if overlaps else {"placement": "colocated", "rollout": {"samples_per_prompt": 2}}
    world = World(tmp_path, config=Config.model_validate(STALE.model_dump(mode="json") | changes))
    learner, sampler = world.run.workers.learner, world.run.workers.student.inner
    step, sample = learner.step, sampler.sample
    learning, sampled, during = threading.Event(), threading.Event(), []

    def stepping(parts, lr):
        learning.set()
        # The last step of a phase has no draw to overlap with.
        if overlaps and learner.policy_version in (2, 3, 4):
            assert sampled.wait(30)
            sampled.clear()
        result = step(parts, lr)
        learning.clear()
        return result

    def sampling(prompts, samples, seed, *rest, **early):
        first = learner.policy_version == 2 and not during
        if overlaps and not first:
            assert learning.wait(30)
        during.append(learning.is_set())
        drawn = sample(prompts, samples, seed, *rest, **early)
        if not first:
            sampled.set()
        return drawn

    learner.step, sampler.sample = stepping, sampling
    world.run = replace(world.run, evaluation=None)
    world.finish()
    assert during == [False, *[overlaps] * 3]
    rows = (tmp_path / "metrics.jsonl").read_text()
    assert ("time_ahead_s" in rows) == overlaps


def test_engines_load_weights_while_the_learner_takes_a_step(tmp_path):
    """This holds for all loads but the first of a phase. The loaded weights are those before the
    learner's step."""
    world = World(tmp_path, config=STALE)
    learner, sampler = world.run.workers.learner, world.run.workers.student.inner
    step, load = learner.step, sampler.load
    learning, loaded, seen = threading.Event(), threading.Event(), []

    def stepping(parts, lr):
        learning.set()
        assert learner.policy_version not in (3, 4) or loaded.wait(30)
        loaded.clear()
        result = step(parts, lr)
        learning.clear()
        return result

    def loading(version):
        overlaps = version.policy_version > 2
        assert not overlaps or learning.wait(30)
        seen.append((version.policy_version, learner.policy_version, learning.is_set()))
        load(version)
        loaded.set()

    learner.step, sampler.load = stepping, loading
    world.run = replace(world.run, evaluation=None)
    world.finish()
    assert seen == [(2, 2, False), (3, 3, True), (4, 4, True)]


def test_a_driver_killed_at_any_call(tmp_path, in_order):
    quiet = World(tmp_path, config=STALE)
    quiet.finish()
    expected = left(tmp_path)
    for at, call in enumerate(quiet.lives.calls):
        directory = tmp_path / str(at)
        directory.mkdir()
        with pytest.raises(Crash):
            World(directory, at, Crash(), config=STALE).finish()
        World(directory, config=STALE).finish()
        assert left(directory) == expected, (at, call)


def test_a_learner_lost_at_any_call(tmp_path, in_order):
    quiet = World(tmp_path, config=STALE)
    quiet.finish()
    for at, call in enumerate(quiet.lives.calls):
        if call in ("step", "publish", "save"):
            directory = tmp_path / str(at)
            directory.mkdir()
            world = World(
                directory, at, LearnerLost(ActorError("learner died"), gone=True), config=STALE
            )
            world.finish()
            assert left(directory) == left(tmp_path), (at, call)
            assert not {w for w, n in world.asked.items() if n > 1 and "h" not in str(w[1])}


@pytest.mark.parametrize("measured_every", [None, 4])
def test_a_failed_draw_ends_the_run_after_the_parallel_step(tmp_path, measured_every):
    """The run ends before weights are published again, because other engines may still be loading
    the previous ones. A checkpoint is written, from which the run resumes."""
    evaluation = STALE.evaluation.model_copy(update={"every_steps": measured_every})
    world = World(tmp_path, config=STALE.model_copy(update={"evaluation": evaluation}))
    sampler, learner = world.run.workers.student.inner, world.run.workers.learner
    sample, publish, failed, published = sampler.sample, learner.publish, threading.Event(), []

    def failing(prompts, samples, seed, *rest, **early):
        if seed == 1_000_003 + 4:
            failed.set()
            raise ActorError("rollout sampling failed: no")
        return sample(prompts, samples, seed, *rest, **early)

    def publishing():
        published.append(failed.is_set())
        return publish()

    sampler.sample, learner.publish = failing, publishing
    with pytest.raises(ActorError, match="rollout sampling failed: no"):
        world.finish()
    assert published and not any(published)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4
    second = World(tmp_path, config=STALE)
    second.finish()
    assert "resuming after step 4" in second.out.getvalue()
    assert len(left(tmp_path)[0]) == 6


def test_a_draw_in_parallel_with_the_learner_has_a_grace_period():
    control = Control(RecoveryConfig(grace_s=1000))
    control.signal, control._asked = signal.SIGTERM, time.monotonic()
    with pytest.raises(Stopped):
        control.check()
    with ThreadPoolExecutor(1) as other:
        other.submit(control.check).result()
        control._asked -= 2000
        with pytest.raises(Stopped):
            other.submit(control.check).result()


@pytest.mark.parametrize(("amount", "steps"), [(3, 1), (6, 2), (8, 3)])
def test_a_budget_ends_with_the_step_that_spends_it(tmp_path, amount, steps):
    """A step has 3 prompts. A draw started in parallel with the last step does not count."""
    config = Config.model_validate(
        STALE.model_dump(mode="json")
        | {"steps": 100, "warmup": None, "budget": {"kind": "prompts", "amount": amount}}
    )
    World(tmp_path, config=config).finish()
    assert len(left(tmp_path)[0]) == steps


def test_by_default_only_text_not_from_the_student_is_sampled_ahead():
    split = {**MINIMAL, "placement": "split"}
    config = Config.model_validate({**split, "sampler": "teacher"})
    assert config.draws_ahead(config)
    for sampler in ("student", "mixture"):
        config = Config.model_validate({**split, "sampler": sampler})
        assert not config.draws_ahead(config)
    assert not Config.model_validate({**MINIMAL, "sampler": "teacher"}).draws_ahead(config)
