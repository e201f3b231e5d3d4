"""Calls on actors: reports of failures, and recovery from them."""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import replace
from subprocess import Popen
from types import SimpleNamespace

import psutil
import pytest
import ray

from actors import groups
from actors.placement import PROCESS, ActorPlan
from actors.pool import Pool, kill_orphans, remote
from seqkd.config.lifecycle import RecoveryConfig
from seqkd.errors import ActorError, LearnerLost, ModelError, Stopped
from seqkd.training.control import Control
from seqkd.types import Prompt, Rollout, WeightVersion
from tests.actors.ray_calls import wait
from tests.actors.workers import Drawing, Late, Loading, Rank, Scorer, Worker

SOON = RecoveryConfig(restarts=3, backoff_s=0.01, heartbeat_s=10, stall_s=60, grace_s=0.5)
PATIENT = SOON.model_copy(update={"heartbeat_s": 60})
"""Long heartbeat timeout, so that a slow machine does not count as a lost process."""
SOON_STALLED = SOON.model_copy(update={"stall_s": 15})


@pytest.fixture
def pool(local_ray, tmp_path):
    """Two workers that are replaced when lost. ``pool.lines`` contains the printed lines."""
    file, lines = tmp_path / "failures", []
    file.write_text("")

    def create(index):
        return remote(Worker).options(num_cpus=0).remote(file)

    pool = Pool("worker", [create(0), create(1)], Control(SOON, lines.append), create)
    pool.each("start")
    pool.file, pool.lines = file, lines
    yield pool
    pool.kill()


def test_a_pool_is_ready_when_the_last_start_of_every_process_has_succeeded(pool):
    ticks = []
    pool.control.tick = lambda: ticks.append(pool.is_ready())
    started, pool.starts = pool.starts, {}
    assert not pool.is_ready()
    pool.starts[0] = started[0]
    assert not pool.is_ready(), "process 1 has not been started"
    pool.starts = started
    assert pool.is_ready()
    pool.each("pid")
    assert ticks and all(ticks), "called while a result is awaited"
    pool.starts[1] = pool.actors[1].refuse.remote()
    ray.wait([pool.starts[1]], timeout=30)
    assert not pool.is_ready()


@pytest.mark.parametrize("how", ["die", "fail", "stop"])
def test_a_lost_call_is_repeated_by_a_new_process(pool, how):
    """The process is killed, raises, or is stopped so that its heartbeat fails. The result of the
    other process is kept."""
    pool.file.write_text("x")
    before = pool.each("pid")
    assert pool.call("once", [(1, how), (2, "")]) == [1, 2]
    after = pool.each("pid")
    assert sum(a != b for a, b in zip(before, after, strict=True)) == 1
    assert len(pool.lines) == 1
    for pid in set(before) - set(after):
        psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=30)
        assert not psutil.pid_exists(pid), "the hung process is left behind"


def test_a_slow_endpoint_is_not_a_hung_process(pool):
    """Requests have their own time limits, so recovery.stall_s applies only to other calls."""
    pool.control.recovery = SOON.model_copy(update={"stall_s": 0.5, "restarts": 0})
    pool.paid = True
    assert pool.call("slow", [(2,), None]) == [2, None]
    assert pool.lines == []
    pool.paid = False
    with pytest.raises(ActorError, match=r"recovery\.stall_s = 0\.5 s"):
        pool.call("slow", [(2,), None])


def test_a_process_that_hangs_during_startup_releases_its_resources(
    local_ray, tmp_path, monkeypatch
):
    """Ray may not end such a process (here it never does), and there are resources for only one."""
    from ray.util.placement_group import placement_group, remove_placement_group

    place = ActorPlan("teacher", 0, threads=1, gpus=0, share=1, bundle=0)
    group = placement_group([{"CPU": 1}])
    file, lines = tmp_path / "failures", []
    file.write_text("x")

    def create(index):
        return remote(Late).options(**place.options(group)).remote(file)

    pool = Pool("teacher", [create(0)], Control(SOON_STALLED, lines.append), create)
    with monkeypatch.context() as patch:
        patch.setattr(ray, "kill", lambda actor: None)
        assert pool.each("start") == [None]
    assert len(lines) == 1 and "recovery.stall_s = 15 s" in lines[0]
    pool.kill()
    remove_placement_group(group)


def test_only_processes_of_this_job_of_this_ray_are_ended(local_ray):
    """The jobs of two Rays on one machine have the same ids."""

    def raylet():
        return os.environ["RAY_RAYLET_PID"]

    own = {
        PROCESS: "teacher 0",
        "RAY_JOB_ID": ray.get_runtime_context().get_job_id(),
        "RAY_RAYLET_PID": ray.get(ray.remote(num_cpus=0)(raylet).remote()),
    }
    others = [{PROCESS: "teacher 1"}, {"RAY_JOB_ID": "02000000"}, {"RAY_RAYLET_PID": "1"}]
    processes = [Popen(["sleep", "600"], env=own | other) for other in ({}, *others)]
    try:
        kill_orphans(["teacher 0", "learner 3"])
        assert processes[0].wait(30) == -signal.SIGKILL
        assert [process.poll() for process in processes[1:]] == [None] * 3
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_only_processes_with_arguments_are_called(pool):
    assert pool.call("once", [None, (2, "")]) == [None, 2]


def test_an_exhausted_restart_budget_reports_the_first_cause(pool):
    pool.file.write_text("x" * 9)
    with pytest.raises(ActorError) as caught:
        pool.call("once", [(1, "die"), None])
    assert str(caught.value).startswith("worker once died: its process crashed or was killed")
    assert "the first of 4 losses" in str(caught.value)
    assert "recovery.restarts is 3" in str(caught.value)
    pool.control.saved()  # a checkpoint resets the budget
    pool.file.write_text("x" * 2)
    assert pool.call("once", [(1, "die"), None]) == [1, None]


def test_an_error_that_a_new_process_repeats_is_not_retried_again(pool):
    pool.file.write_text("x" * 9)
    with pytest.raises(ActorError) as caught:
        pool.call("once", [(1, "fail"), None])
    message = "worker once failed: ConnectionError: connection closed by peer"
    assert str(caught.value) == message
    assert "in fail" in caught.value.details
    assert pool.file.read_text() == "x" * 7


def test_an_error_for_the_user_is_raised_at_once(pool):
    with pytest.raises(ModelError, match=r"student\.model: is none\."):
        pool.call("refuse", [(), None])
    assert not pool.lines


def test_a_new_engine_gets_the_weights_of_the_others(local_ray, tmp_path):
    """No engine is replaced if the learner is lost as well."""
    file = tmp_path / "failures"
    file.write_text("")

    def create(index):
        return remote(Loading).options(num_cpus=0).remote(file)

    lines, lost = [], []
    pool = Pool("rollout", [create(0), create(1)], Control(PATIENT, lines.append), create)
    pool.each("start")
    learner = SimpleNamespace(alive=lambda: lost and lost_learner())
    group = groups.RolloutGroup(pool, 1, learner)
    group.load(WeightVersion(6, "/published", "here", {}))
    group.loaded = replace(group.loaded, path="/gone")
    file.write_text("x")  # one is lost during the sync
    group.load(WeightVersion(7, "/published", "here", {}))
    file.write_text("x")
    assert pool.call("loaded", [(1,), None]) == [7, None]
    assert group.policy_version == 7
    file.write_text("x")  # an engine and the learner at once: the published weights are lost
    lost.append(True)
    assert len(lines) == 2
    with pytest.raises(LearnerLost, match="learner died"):
        pool.call("loaded", [(1,), None])
    assert len(lines) == 2, "a new engine would not help"
    group.mark_stale()
    assert group.policy_version is None
    pool.kill()


def lost_learner():
    raise LearnerLost(ActorError("learner died"), gone=True)


@pytest.fixture
def learner(local_ray, monkeypatch):
    """Learner group of two workers."""
    monkeypatch.setattr(groups, "SETTLE_S", 2.0)

    lines = []
    group = groups.LearnerGroup(
        lambda: [remote(Rank).options(num_cpus=0).remote() for _ in range(2)], (), 1, "",
        Control(SOON, lines.append),
    )  # fmt: skip
    group.ready()
    yield group
    group.kill()


def ask(learner, *methods):
    refs = [getattr(r, m).remote() for r, m in zip(learner.ranks, methods, strict=True)]
    return learner._results("step", refs)


def test_a_learner_is_ready_until_it_is_lost(learner):
    assert learner.is_ready()
    learner.starts[1] = learner.ranks[1].refuse.remote()
    ray.wait(learner.starts, num_returns=2, timeout=30)
    assert not learner.is_ready()
    learner.kill()
    assert not learner.is_ready()


def test_a_failure_is_raised_without_waiting_for_a_hung_rank(learner):
    with pytest.raises(ModelError, match=r"student\.model: is none\."):
        ask(learner, "hang", "refuse")


def test_published_weights_can_be_read_while_the_learner_is_busy(learner, tmp_path):
    """An engine on another node loads weights during the next step."""
    (tmp_path / "weights").write_bytes(b"weights")
    learner.ranks[0].hang.remote()
    version = WeightVersion(1, str(tmp_path / "weights"), "here", {})
    assert ray.get(learner.published_bytes(version), timeout=60) == b"weights"


def test_a_death_takes_precedence_over_the_errors_that_it_causes(learner):
    with pytest.raises(LearnerLost, match="learner step died") as caught:
        ask(learner, "fail", "die")
    assert caught.value.gone


def test_a_stopped_rank_is_detected_by_its_heartbeat(learner):
    os.kill(wait(learner.ranks[1].pid.remote()), signal.SIGSTOP)
    with pytest.raises(LearnerLost, match=r"learner step: process 1 has not answered for"):
        ask(learner, "hang", "pid")
    learner.restart()
    assert len(set(ask(learner, "pid", "pid"))) == 2


def test_a_call_that_never_finishes_is_a_hang(learner):
    learner.control.recovery = SOON.model_copy(update={"stall_s": 1.0})
    with pytest.raises(LearnerLost, match=r"has not finished within recovery\.stall_s = 1 s"):
        ask(learner, "hang", "pid")


def test_a_signal_ends_a_wait_and_a_second_one_the_process(learner):
    control, before = learner.control, signal.getsignal(signal.SIGTERM)
    with control.signals():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped, match="SIGTERM"):
            ask(learner, "pid", "pid")
        learner.save("pid")  # a checkpoint is not interrupted
        refs = [rank.hang.remote() for rank in learner.ranks]
        with pytest.raises(Stopped):  # a step has a grace period
            learner._results("step", refs, control.check_after_grace)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            threading.Event().wait(10)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.fixture
def engines(local_ray, tmp_path):
    """Two engines that wait for ``engines.file``. ``engines.lines`` contains the printed lines."""
    file, lines = tmp_path / "engines", []

    def create(index):
        return remote(Drawing).options(num_cpus=0).remote(file)

    patient = SOON.model_copy(update={"heartbeat_s": 120, "stall_s": 240})
    pool = Pool("rollout", [create(0), create(1)], Control(patient, lines.append), create)
    pool.file, pool.lines = file, lines
    yield pool
    pool.kill()


EIGHT = [Prompt(str(i), (i,), "") for i in range(8)]


def draw(engines, letters):
    """Return the completions that were reported early, and the result. The engines wait until
    twelve completions are reported."""
    early = []

    def finished(prompt, rollout):
        assert rollout.prompt_id == EIGHT[prompt].prompt_id
        early.append(rollout)
        if len(early) == 12:
            written = engines.file.with_suffix(".written")
            written.write_text(letters)
            written.rename(engines.file)  # the file appears with its content

    sample = groups.RolloutGroup(engines, 1).sample
    return early, sample(EIGHT, [2] * 8, seed=0, finished=finished)


def test_completions_are_reported_while_others_are_sampled(engines):
    early, drawn = draw(engines, letters="")
    assert {r.prompt_id for r in early[:12]} == {"2", "3", "4", "5", "6", "7"}
    assert [r.prompt_id for r in drawn] == [str(i) for i in range(8) for _ in range(2)]
    assert sorted(early, key=lambda r: r.sample_id) == sorted(drawn, key=lambda r: r.sample_id)


def test_completions_of_a_lost_engine_are_kept_and_reported_once(engines):
    """They may already be scored, so the result must contain the same completions."""
    early, drawn = draw(engines, letters="x")
    assert len(engines.lines) == 1, "an engine was lost"
    assert sorted(early, key=lambda r: r.sample_id) == sorted(drawn, key=lambda r: r.sample_id)
    assert len({r.source for r in drawn}) == 3, "two engines and the replacement of one"


def test_fewer_completions_than_copies_of_a_teacher_are_scored(local_ray):
    copies = Pool("teacher", [remote(Scorer).options(num_cpus=0).remote() for _ in range(3)])
    rollout = Rollout("p", "p/0", (1,), (2,), (0.0,), "student", 0, "stop")
    assert groups.TeacherGroup(copies, "a").score([rollout])["p/0"].teacher == "a"
    copies.kill()


def test_completions_are_returned_in_the_order_of_prompts(local_ray):
    engines = [remote(Drawing).options(num_cpus=0).remote() for _ in range(3)]
    prompts = [Prompt(str(i), (i,), "") for i in range(8)]
    samples = [2, 1, 3, 1, 1, 2, 4, 1]
    drawn = groups.RolloutGroup(Pool("rollout", engines), 1).sample(prompts, samples, seed=0)
    expected = [str(i) for i, n in enumerate(samples) for _ in range(n)]
    assert [r.prompt_id for r in drawn] == expected
    assert len({r.sample_id.split("/")[1] for r in drawn}) == len(prompts), "one seed per prompt"
    for engine in engines:
        local_ray.kill(engine)
