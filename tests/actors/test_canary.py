"""Faults injected into real actors during a run, and the messages that report them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from actors import weight_sync
from actors.groups import LearnerGroup, RolloutGroup, TeacherGroup
from actors.learner import LearnerRank
from actors.placement import ActorPlan
from actors.pool import Pool, remote
from actors.rollout import RolloutActor
from actors.teacher import TeacherActor
from seqkd.checks.alarms import StepAlarms
from seqkd.checks.canary import Canary, must_move
from seqkd.checks.invariants import check_counts
from seqkd.checks.preflight import check
from seqkd.checks.probe import as_rollout
from seqkd.config.learner import LearnerConfig
from seqkd.config.resources import EngineConfig
from seqkd.errors import LearningFault
from seqkd.learner.running_costs import RunningCosts
from seqkd.protocols import Part
from seqkd.training.clock import Clock
from seqkd.training.rollouts import RolloutSource
from seqkd.training.step_metrics import step_metrics
from seqkd.workers import Workers
from tests.actors.ray_calls import COMPLETION, PROMPT, small_config, wait

PLAN = ActorPlan("teacher", 0, threads=1, gpus=0, share=1, bundle=0)


class Faulty:
    """Real actor whose answers can be made faulty."""

    fault = ""

    def set_fault(self, fault):
        self.fault = fault


class FaultyEngine(Faulty, RolloutActor):
    def load(self, version, data):
        if self.fault == "keeps the old weights":
            self.policy_version = version.policy_version
        elif self.fault == "loses its weights":
            state = load_file(version.path)
            state = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
            with weight_sync.memory_file() as file:
                lost = weight_sync.publish(state, version.policy_version, file, version.node_id)
                super().load(lost, None)
        elif self.fault == "keeps its cache":
            reset, self.llm.reset_prefix_cache = self.llm.reset_prefix_cache, lambda: None
            super().load(version, data)
            self.llm.reset_prefix_cache = reset
        else:
            super().load(version, data)

    def sample(self, prompts, seeds, samples, max_tokens, temperature, top_p):
        hotter = 1.3 if self.fault == "samples at another temperature" else 1.0
        drawn = super().sample(prompts, seeds, samples, max_tokens, hotter * temperature, top_p)
        for place, index, rollout in drawn:
            if index == 1 and self.fault == "drops a sample":
                continue
            if index == 1 and self.fault == "duplicates a sample":
                rollout = replace(rollout, sample_id=f"{rollout.sample_id[:-1]}0")
            if self.fault == "shifts its log-probs":
                first, *others = rollout.rollout_logprobs
                rollout = replace(rollout, rollout_logprobs=(*others, first))
            yield place, index, rollout


class FaultyTeacher(Faulty, TeacherActor):
    def score(self, rollouts):
        change = {
            "returns zeros": torch.zeros_like,
            "returns nan": lambda values: values * torch.nan,
            "shifts its scores": lambda values: values.roll(1, 0),
        }.get(self.fault, lambda values: values)
        return [
            replace(s, logprobs=change(s.logprobs))
            if s.hidden is None
            else replace(s, hidden=change(s.hidden))
            for s in super().score(rollouts)
        ]


class FaultyLearner(Faulty, LearnerRank):
    def step(self, parts, lr):
        return super().step(parts, 0.0 if self.fault == "does not change" else lr)


@pytest.fixture(scope="module")
def make_config(tiny, tmp_path_factory):
    return lambda scores: small_config(tiny, tmp_path_factory.mktemp("data"), scores=scores)


@pytest.fixture(scope="module")
def crew(local_ray, tiny):
    """One learner, one teacher, and two engines with the student's weights."""
    environment = {"env_vars": PLAN.environment()}

    def create(cls, *args):
        return remote(cls).options(runtime_env=environment).remote(*args)

    learner = LearnerGroup(
        lambda: [create(FaultyLearner, LearnerConfig(zero_stage=0))],
        (tiny["student"], {"": (tiny["teacher"], "float32")}),
        2,
        tiny["student"],
    )
    learner.ready()
    teacher = create(FaultyTeacher)
    engines = [create(FaultyEngine, (0,), "student") for _ in range(2)]
    start = tiny["student"], EngineConfig(kv_cache_gib=0.1), 512
    wait([engine.start.remote(*start) for engine in engines])
    yield learner, teacher, engines
    learner.kill()
    for actor in (teacher, *engines):
        local_ray.kill(actor)


class Run:
    """Training loop that is run step by step."""

    def __init__(self, config, crew, tiny):
        self.config, (self.learner, self.teacher, self.engines) = config, crew
        wait(self.teacher.start.remote(config.teacher, PROMPT + COMPLETION, 320))
        student = RolloutGroup(Pool("rollout", self.engines), COMPLETION, self.learner)
        self.workers = Workers(
            student=student,
            learner=self.learner,
            teachers={"": TeacherGroup(Pool("teacher", [self.teacher]))},
            teacher_samplers={},
            teacher_of=config.teacher.choose,
            distribution=True,
        )
        for actor in (*self.learner.ranks, self.teacher, *self.engines):
            wait(actor.set_fault.remote(""))
        student.load(self.learner.publish())
        self.learner.policy_version = student.policy_version
        checked = check(config)
        self.prompts, self.stepped, self.number = list(checked.train), False, 0
        self.source = RolloutSource(config, config, "student", self.workers)
        self.canary = Canary(config, checked, self.workers, ("rollout", "teacher", "learner"))
        self.alarms = StepAlarms(config, checked.vocabulary)

    def step(self):
        """Take one step and return its warnings."""
        clock, version = Clock(), self.workers.learner.policy_version
        self.workers.sync()
        drawn = self.source.draw([self.prompts], self.number, clock)
        self.canary.check(self.canary.ask(version), self.stepped)
        rollouts, masked, _ = self.source.split(drawn.steps[0], drawn.scores)
        counts = RunningCosts().counts(rollouts)
        part = Part(rollouts, drawn.scores, counts, self.source.terms, masked=masked)
        result = self.workers.learner.step([part], 1e-3)
        self.stepped = must_move(1e-3, result.grad_norm)
        self.number += 1
        check_counts(part, result.parts[0])
        row = step_metrics(self.config, "main", self.config, version, 1e-3, [part], result)
        return self.alarms.check(row)


@pytest.fixture
def run(make_config, crew, tiny):
    def run(scores="hidden"):
        run = Run(make_config(scores), crew, tiny)
        assert run.step() == []
        return run

    return run


def caught(run, fault):
    with pytest.raises(LearningFault) as error:
        run.step()
    print(f"\n{fault}: {error.value}")
    (message,) = str(error.value).splitlines()
    return message


@pytest.mark.parametrize("scores", ["hidden", "top_k", "logprobs"])
def test_healthy_actors_raise_no_fault(run, scores):
    run = run(scores)
    assert [run.step() for _ in range(6)] == [[]] * 6


ENGINE_FAULTS = {
    "keeps the old weights": "rollout engine 1 has stale weights",
    "loses its weights": "rollout engine 1 has lost its weights: its mean probe log-prob is -5.768",
    "samples at another temperature": "logprob_gap_mean: the engine that sampled the completions",
    "shifts its log-probs": "logprob_gap_mean: the engine that sampled the completions",
    "drops a sample": "rollout 1: returned 3 completions instead of 4",
    "duplicates a sample": "rollout 1: returned the completion",
}


@pytest.mark.parametrize("fault", ENGINE_FAULTS)
def test_engine_faults(run, fault):
    run = run()
    wait(run.engines[1].set_fault.remote(fault))
    assert ENGINE_FAULTS[fault] in caught(run, f"engine {fault}")


def test_probe_scores_do_not_use_the_prefix_cache(run):
    """The canary must see the current weights, not cached states of older weights. The text fills
    several cache blocks."""
    run = run()
    student, learner = run.workers.student, run.workers.learner
    text = as_rollout("long", tuple(5 + i % 250 for i in range(300)), tuple(range(9, 109)))
    ids = [*text.prompt_ids, *text.completion_ids]
    before = student.logprobs(ids)
    for engine in run.engines:
        wait(engine.set_fault.remote("keeps its cache"))
    run.workers.sync()
    expected = learner.measure([text], {})["long"]["student_logprob"]
    for old, now in zip(before, student.logprobs(ids), strict=True):
        assert now[-100:] == pytest.approx(expected, abs=1e-3)
        assert now[-100:] != pytest.approx(old[-100:], abs=1e-3)


@pytest.mark.parametrize("scores", ["hidden", "top_k", "logprobs"])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("returns zeros", "returned scores of zeros"),
        ("returns nan", "the teacher returned non-finite log-probs for the probe text"),
        ("shifts its scores", "the teacher, actor 0, has changed: its probe log-probs differ"),
    ],
)
def test_teacher_faults(run, fault, message, scores):
    run = run(scores)
    wait(run.teacher.set_fault.remote(fault))
    if fault == "returns zeros" and scores == "hidden":
        message = "returned hidden states of zeros: every probe log-prob is -ln V = -5.768"
    assert message in caught(run, f"teacher ({scores}) {fault}")


def test_a_teacher_replaced_by_another_model(run, tmp_path):
    from scripts.tiny_models import write_tiny

    run = run()
    other = str(write_tiny(tmp_path / "other", layers=4, seed=9))
    config = run.config.teacher.model_copy(update={"model": other})
    wait(run.teacher.start.remote(config, PROMPT + COMPLETION, 320))
    message = caught(run, "teacher is replaced by another model")
    assert "the teacher, actor 0, has changed: its probe log-probs differ by" in message


def test_a_learner_that_does_not_change(run):
    run = run()
    run.step()
    wait(run.learner.ranks[0].set_fault.remote("does not change"))
    run.step()
    assert "the learner's weights do not change" in caught(run, "learner does not change")
