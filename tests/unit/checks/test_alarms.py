"""Rules of the canary and of the step alarms, with small fakes for the protocols."""

from __future__ import annotations

import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
import yaml

from seqkd.checks.alarms import StepAlarms
from seqkd.checks.canary import SMALLEST_LR, Canary, must_move
from seqkd.checks.invariants import check_counts, check_sampled, check_trained
from seqkd.config.alarms import AlarmConfig, AlarmsConfig
from seqkd.config.run import Config, load
from seqkd.errors import ConfigError, LearningFault
from seqkd.evaluation.text import repetition
from seqkd.protocols import Part
from seqkd.training.step_metrics import step_metrics
from seqkd.types import Counts, PartResult, Prompt, Rollout, StepResult, TeacherScore
from tests.conftest import ROOT
from tests.unit.config.test_config import MINIMAL, path  # noqa: F401 (a fixture)

V = 1000
PROMPT = Prompt("p", tuple(range(40)), "")
ENGLISH = list(range(100, 150))
UNIFORM = -math.log(V)


def config(**changes):
    return Config.model_validate({**MINIMAL, **changes})


def logprobs(mean=-2.0, seed=0):
    """Return log-probs of shape [50] with a mean near ``mean``."""
    noise = torch.randn(len(ENGLISH), generator=torch.Generator().manual_seed(seed))
    return (mean + 0.1 * noise).tolist()


class World:
    """A learner, two engines and two teachers whose log-probs can be set."""

    def __init__(self, changes=None, roles=("rollout", "teacher", "learner")):
        members = {n: {"teacher": {"kind": "hf", "model": n, "actors": 2}} for n in ("a", "b")}
        several = {"kind": "multi", "teachers": members}
        self.config = config(**{"teacher": several, **(changes or {})})
        self.learner, self.engines = logprobs(), [logprobs(), logprobs()]
        self.teachers = {"a": [logprobs(-1, 1)] * 2, "b": [logprobs(-1, 2)] * 2}
        self.asked = []
        student = SimpleNamespace(policy_version=0, logprobs=self.logprobs)
        workers = SimpleNamespace(
            student=student,
            learner=SimpleNamespace(policy_version=0, measure=self.measure),
            teachers={
                name: SimpleNamespace(score=lambda r, name=name: self.teach(name, r))
                for name in self.teachers
            },
        )
        checked = SimpleNamespace(
            tokenizer=lambda text, add_special_tokens: SimpleNamespace(input_ids=ENGLISH),
            train=[PROMPT],
            max_model_len=96,
            vocabulary=V,
        )
        self.workers = workers
        self.canary = Canary(self.config, checked, workers, set(roles))

    def logprobs(self, token_ids):
        assert token_ids == [*PROMPT.token_ids, *ENGLISH]
        return [[0.0] * (len(PROMPT.token_ids) - 1) + engine for engine in self.engines]

    def teach(self, name, rollouts):
        self.asked.append((name, len(rollouts)))
        return {
            r.sample_id: TeacherScore(r.sample_id, logprobs=torch.tensor(answer))
            for r, answer in zip(rollouts, self.teachers[name], strict=True)
        }

    def measure(self, rollouts, scores, ends=()):
        assert scores.keys() == ({r.sample_id for r in rollouts} if scores else set())
        return {
            r.sample_id: {"student_logprob": self.learner}
            | ({"teacher_logprob": scores[r.sample_id].logprobs.tolist()} if scores else {})
            for r in rollouts
        }

    def step(self, by=0.01):
        """Take a learner step and load its weights into all engines."""
        self.learner = [value + by for value in self.learner]
        self.engines = [self.learner for _ in self.engines]
        self.workers.student.policy_version += 1
        self.workers.learner.policy_version += 1

    def check(self, stepped):
        """Ask and check at once, as without sampling ahead."""
        asked = self.canary.ask(self.workers.learner.policy_version)
        self.canary.check(asked, stepped)

    def fault(self, stepped=False):
        with pytest.raises(LearningFault) as caught:
            self.check(stepped)
        return str(caught.value)


def test_a_healthy_run_raises_no_fault():
    world = World()
    for stepped in (False, True, True):
        world.check(stepped)
        world.step()
    assert world.asked == [("a", 2), ("b", 2)] * 3, "all actors are asked every time"
    before = world.learner
    world.check(True)
    world.check(False)  # a skipped step does not change the weights
    assert world.learner == before


def test_an_engine_that_waits_for_its_next_sync_is_not_compared():
    world = World()
    world.check(False)
    old = world.engines
    world.step(by=1.0)
    world.engines, world.workers.student.policy_version = old, 0
    world.check(True)


def test_an_engine_asked_before_a_step_is_compared_with_the_learner_before_that_step():
    """When sampling ahead, a draw runs in parallel with a step, so its answers are one step
    old."""
    world = World()
    world.check(False)
    for fault in (0.0, 0.0, 0.002):
        world.canary.hold()
        engines = world.engines
        world.engines = [[value + fault for value in engine] for engine in engines]
        asked = world.canary.ask(world.workers.learner.policy_version)
        world.engines = engines
        world.step(by=1.0)
        if not fault:
            world.canary.check(asked, True)
    with pytest.raises(
        LearningFault, match=r"rollout engine 0 does not have .* differ by 0\.002 nats"
    ):
        world.canary.check(asked, True)


def test_a_stale_engine_is_detected_when_sampling_ahead():
    world = World()
    for _ in range(2):
        world.canary.hold()
        asked = world.canary.ask(world.workers.learner.policy_version)
        old = world.engines
        world.step(by=1e-4)
        world.canary.check(asked, True)
    world.engines = old  # the engines acknowledged the new weights but kept the old ones
    asked = world.canary.ask(world.workers.learner.policy_version)
    world.step(by=1e-4)
    with pytest.raises(LearningFault, match="has stale weights"):
        world.canary.check(asked, True)


def test_batching_of_the_probe_in_the_learner_makes_no_engine_stale():
    """In a batch with other texts the learner's log-probs differ in their last bits, by more than
    the threshold for stale engines."""
    world = World()
    measure = world.workers.learner.measure

    def measured(rollouts, scores, ends=()):
        values = measure(rollouts, scores, ends)
        if len(rollouts) > 1:
            for row in values.values():
                row["student_logprob"] = [value + 1e-6 for value in row["student_logprob"]]
        return values

    world.workers.learner.measure = measured
    world.check(False)
    world.step(by=0.0)  # skipped
    world.canary.hold()
    asked = world.canary.ask(world.workers.learner.policy_version)
    world.step(by=0.0)
    world.canary.check(asked, False)


def test_without_teachers_or_engines_the_learner_alone_is_asked():
    world = World(roles=("learner",))
    world.engines = [[math.nan] * len(ENGLISH)]
    world.check(False)
    assert not world.asked
    assert "the learner's weights do not change" in world.fault(stepped=True)


def test_an_engine_with_other_weights():
    world = World()
    world.engines[1] = [value + 0.002 for value in world.learner]
    message = world.fault()
    assert message.startswith("canary: rollout engine 1 does not have the learner's weights")
    assert "by 0.002 nats per token (limit 0.001)" in message
    half = World({"rollout": {"precision": "bfloat16"}})
    half.engines[1] = world.engines[1]
    half.check(False)


def test_an_engine_with_stale_weights_after_a_tiny_step():
    world = World()
    world.check(False)
    old = world.engines[0]
    world.step(by=1e-6)
    world.engines[0] = old
    message = world.fault(stepped=True)
    assert message.startswith("canary: rollout engine 0 has stale weights: its probe log-probs")
    assert "e-07 nats per token. It acknowledged the sync" in message


def test_a_bfloat16_engine_may_round_away_one_small_step_but_not_several():
    world = World({"rollout": {"precision": "bfloat16"}})
    world.check(False)
    old = world.engines
    for _ in range(3):
        world.step(by=4e-4)
        world.engines = old
        if world.workers.student.policy_version < 3:
            world.check(True)
    assert "changed by 0.0012 nats per token" in world.fault(stepped=True)


def test_an_engine_that_lost_its_weights():
    world = World()
    world.check(False)
    world.step()
    world.engines[1] = [UNIFORM] * len(ENGLISH)
    message = world.fault(stepped=True)
    assert "rollout engine 1 has lost its weights: its mean probe log-prob is -6.908" in message


def test_an_untrained_student_has_not_lost_its_weights():
    world = World()
    world.learner, world.engines = [UNIFORM] * 50, [[UNIFORM] * 50] * 2
    world.check(False)
    edge = 0.9 * UNIFORM
    world.learner, world.engines = [edge + 4e-4] * 50, [[edge - 4e-4] * 50] * 2
    world.check(False)
    world.learner, world.engines = [UNIFORM - 0.1] * 50, [[UNIFORM] * 50] * 2
    assert "does not have the learner's weights" in world.fault()


def test_a_step_that_rounds_to_zero_changes_no_weights():
    assert must_move(1e-5, 0.1)
    assert not must_move(1e-5, 0.0)
    assert not must_move(1e-5, math.nan)
    assert torch.tensor(0.02) + 2.5e-13 == torch.tensor(0.02)
    assert not must_move(2.5e-13, 0.1)  # the last of 10,000 steps of a cosine to 0
    assert torch.tensor(0.02) + SMALLEST_LR != torch.tensor(0.02)


def test_a_frozen_learner():
    world = World()
    world.check(False)
    assert "the learner's weights do not change" in world.fault(stepped=True)
    half = World({"learner": {"precision": "bfloat16"}})
    half.check(False)
    half.check(True)


def test_a_swapped_teacher():
    world = World()
    world.check(False)
    first = json.loads(json.dumps(world.canary.first))
    world.teachers["b"] = [world.teachers["b"][0], logprobs(-1, 3)]
    message = world.fault()
    assert message.startswith("canary: teacher b, actor 1, has changed: its probe log-probs differ")
    again = World()
    again.canary.begin(first)
    again.check(False)
    again.teachers["a"] = [[*world.teachers["a"][0][1:], -1.0]] * 2
    assert "teacher a, actor 0, has changed" in again.fault()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.0, "returned scores of zeros: every probe log-prob is 0"),
        (UNIFORM, "returned hidden states of zeros: every probe log-prob is -ln V = -6.908"),
    ],
)
def test_scores_of_zero(value, message):
    world = World()
    world.teachers["a"] = [[value] * len(ENGLISH)] * 2
    assert message in world.fault()


def test_missing_and_non_finite_log_probs():
    world = World()
    world.teachers["a"] = [[-1.0] * 49] * 2
    assert "teacher a returned no log-prob for some tokens of the probe text" in world.fault()
    for place in ("learner", "engine", "teacher"):
        world = World()
        broken = [*logprobs()[1:], math.nan]
        if place == "learner":
            world.learner = broken
        elif place == "engine":
            world.engines[1] = broken
        else:
            world.teachers["b"] = [broken, broken]
        (message,) = world.fault().splitlines()
        assert "non-finite log-probs" in message
        assert {"learner": "the learner", "engine": "engine 1", "teacher": "teacher b"}[place] in (
            message
        )


def test_a_long_prompt_is_truncated_to_make_room_for_the_probe():
    from seqkd.checks.probe import answers

    checked = SimpleNamespace(
        tokenizer=lambda text, add_special_tokens: SimpleNamespace(input_ids=ENGLISH),
        train=[PROMPT],
        max_model_len=60,
    )
    (text,) = answers(checked, "x", 1)
    assert (len(text.prompt_ids), len(text.completion_ids)) == (9, 50)


# --- metrics rows


def row(**changes):
    healthy = {
        "phase": "main", "sampler": "student", "policy_version": 3, "loss": 1.0, "grad_norm": 2.0,
        "length": 20.0, "truncation_rate": 0.2, "repetition": 0.05, "entropy_per_token": 1.5,
        "logprob_gap_mean": 1e-5, "teacher_logprob_per_token": -2.0,
    }  # fmt: skip
    return {**healthy, **changes}


def alarms(vocabulary=V, **changes):
    return StepAlarms(config(**changes), vocabulary)


def stopped(watch, **changes):
    with pytest.raises(LearningFault) as caught:
        watch.check(row(**changes))
    return str(caught.value)


def test_a_healthy_run_causes_no_warning():
    watch = alarms()
    # A learning student writes longer completions, with less entropy, and ends more of them.
    for step in range(60):
        figures = {"length": 20 + step, "entropy_per_token": 2 - step / 40}
        assert watch.check(row(**figures, truncation_rate=0.95 - step / 100)) == []


def test_a_log_prob_gap():
    assert "by 0.0015 nats per token (limit 0.001)" in stopped(alarms(), logprob_gap_mean=0.0015)
    assert "nan" in stopped(alarms(), logprob_gap_mean=math.nan)
    assert alarms(rollout={"precision": "bfloat16"}).check(row(logprob_gap_mean=0.1)) == []
    assert alarms(alarms={"logprob_gap": 0.3}).check(row(logprob_gap_mean=0.25)) == []
    other = alarms(teacher={**MINIMAL["teacher"], "precision": "bfloat16"})
    assert "limit 0.001" in stopped(other, logprob_gap_mean=0.0015)
    assert other.check(row(sampler="teacher", logprob_gap_mean=0.1)) == []
    coarse = alarms(learner={"precision": "bfloat16"})
    assert "teacher/logprob_gap_mean" in stopped(coarse, **{"teacher/logprob_gap_mean": 0.1})


@pytest.mark.parametrize("vocabulary", [V, 151936])
def test_teacher_scores_of_zeros(vocabulary):
    watch, uniform = alarms(vocabulary), -math.log(vocabulary)
    assert "-ln V" in stopped(watch, teacher_logprob_per_token=uniform * (1 + 1e-6))
    assert "are zeros" in stopped(watch, **{"mixture/teacher_logprob_per_token": 0.0})
    assert "are not finite" in stopped(watch, teacher_logprob_per_token=math.nan)
    assert watch.check(row(teacher_logprob_per_token=uniform * 1.0005)) == []


def test_non_finite_steps():
    watch = alarms()
    skipped = {"skipped": True, "loss": math.nan, "teacher_logprob_per_token": math.nan}
    for _ in range(2):
        assert watch.check(row(**skipped)) == []
        assert watch.check(row(**skipped)) == []
        assert watch.check(row(skipped=False)) == []
    watch.replay([row(**skipped)] * 2)
    assert "in 3 steps in a row" in stopped(watch, **skipped)
    assert "the optimizer took a step" in stopped(alarms(), grad_norm=math.inf)
    watch = alarms()
    rows = [row(**skipped, length=math.nan)] + [row()] * 5 + [row(length=100)] * 5
    assert sum(len(watch.check(r)) for r in rows) == 1, "means exclude skipped steps"


@pytest.mark.parametrize(
    ("name", "metric", "bad"),
    [
        ("truncation_rate", "truncation_rate", 1.0),
        ("length_growth", "length", 81.0),
        ("repetition", "repetition", 0.6),
        ("entropy_fraction", "entropy_per_token", 0.1),
    ],
)
def test_levels(name, metric, bad):
    watch = alarms()
    assert [watch.check(row()) for _ in range(5)] == [[]] * 5
    assert [watch.check(row(**{metric: bad})) for _ in range(4)] == [[]] * 4, "one step is noise"
    (warning,) = watch.check(row(**{metric: bad}))
    assert warning.startswith(f"alarms.{name}.warn ")
    assert watch.check(row(**{metric: bad})) == [], "each warning is printed once"
    for _ in range(9):
        watch.check(row(phase="next", **{metric: bad}))
    relative = name in ("length_growth", "entropy_fraction")
    assert bool(watch.warned) != relative, "relative figures start again in each phase"

    level = getattr(AlarmsConfig(), name).warn
    watch = alarms(alarms={name: {"stop": level}})
    rows = [row()] * 5 + [row(**{metric: bad})] * 4
    watch.replay([json.loads(json.dumps(r)) for r in rows])  # as in a resumed run
    assert f"alarms.{name}.stop" in stopped(watch, **{metric: bad})
    watch = alarms(alarms={name: {"warn": None}})
    assert not any(watch.check(r) for r in rows + rows[-1:])


def test_levels_apply_only_to_text_of_the_student():
    watch = alarms()
    teachers = row(sampler="teacher", **{"truncation_rate": 1.0, "student/repetition": 0.7})
    warnings = [w for _ in range(6) for w in watch.check(teachers)]
    assert [w.split(" ")[0] for w in warnings] == ["alarms.repetition.warn"]


def test_a_warning_after_the_stop_is_refused(path):  # noqa: F811
    with pytest.raises(ConfigError, match=r"alarms\.repetition: stop is 0\.4, which is reached"):
        load(path, ["alarms.repetition.stop=0.4"])
    with pytest.raises(ConfigError, match=r"alarms\.entropy_fraction: stop is 0\.2, which"):
        load(path, ["alarms.entropy_fraction.stop=0.2"])
    load(path, ["alarms.repetition.stop=0.5", "alarms.entropy_fraction.stop=0.01"])


def test_the_page_has_every_level_with_its_defaults():
    page = (ROOT / "docs" / "health_checks.md").read_text()
    (text,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert Config.model_validate({**MINIMAL, **yaml.safe_load(text)}).alarms != AlarmsConfig()
    for name, level in AlarmsConfig():
        assert f"`{name}`" in page or f"`alarms.{name}`" in page
        if isinstance(level, AlarmConfig):
            warn, stop = (yaml.safe_dump(v).split()[0] for v in (level.warn, level.stop))
            assert re.search(
                rf"^\| `{name}` .* \| {float(warn):g} \| {stop} \|", page, re.MULTILINE
            )


# --- counts


def rollout(prompt, sample, ids=(1, 2), reason="stop", prompt_ids=None):
    name = f"{prompt}/{sample}"
    return Rollout(prompt, name, prompt_ids or (int(prompt),), ids, None, "student", 0, reason)


PROMPTS = [Prompt("1", (1,), ""), Prompt("2", (2,), "")]
DRAWN = [rollout("1", 0), rollout("1", 1), rollout("2", 0)]


@pytest.mark.parametrize(
    ("drawn", "message"),
    [
        (DRAWN[:-1], "returned 2 completions instead of 3"),
        ([*DRAWN, DRAWN[0]], "returned 4 completions instead of 3"),
        ([DRAWN[0], DRAWN[2], DRAWN[1]], "do not match the prompts in order"),
        ([DRAWN[0], DRAWN[0], DRAWN[2]], "returned the completion 1/0 2 times"),
        ([], "returned 0 completions instead of 3"),
    ],
)
def test_sampled_completions(drawn, message):
    check_sampled("rollout 0", PROMPTS, [2, 1], DRAWN)
    check_sampled("rollout 0", [], [], [])
    with pytest.raises(LearningFault, match=message):
        check_sampled("rollout 0", PROMPTS, [2, 1], drawn)


def test_trained_completions():
    twice = [*DRAWN, DRAWN[0]]  # a step may contain the same answer of a data set twice
    check_trained(twice, ["1/0", "2/0", "1/0", "1/1"])
    with pytest.raises(LearningFault, match=r"1 of 4 .* not trained on \(1/0\), and 0 were"):
        check_trained(twice, ["1/0", "2/0", "1/1"])
    with pytest.raises(LearningFault, match=r"and 1 were trained on that .* \(2/0\)"):
        check_trained(DRAWN, ["1/0", "2/0", "1/1", "2/0"])


@pytest.mark.parametrize("name", ["sequences", "tokens"])
def test_counts_that_the_loss_was_divided_by(name):
    part = Part(DRAWN, {}, Counts(3, 6), ())
    seen = {"sequences": 3.0, "tokens": 6.0}
    check_counts(part, PartResult(seen))
    with pytest.raises(LearningFault, match=f"{name}, but the ranks saw"):
        check_counts(part, PartResult({**seen, name: seen[name] - 1}))


# --- figures


def test_repetition_is_the_share_of_4_grams_that_occurred_before():
    assert repetition([rollout("1", 0, (1, 2, 3))]) == 0
    assert repetition([rollout("1", 0, (7,) * 8)]) == 4 / 5
    # 1234 2341 3412 4123 1234: one of five repeats. Repeats across completions do not count.
    assert repetition([rollout("1", i, (1, 2, 3, 4, 1, 2, 3, 4)) for i in range(2)]) == 1 / 5


def test_figures_of_a_step():
    c = config()
    rollouts = [rollout("1", 0, (5,) * 5), *(rollout("2", i, reason="length") for i in range(3))]
    part = Part(rollouts, {}, Counts(4, 11), c.terms)
    ratios = [0.5, 1.0, 1.5]
    sums = {
        "tokens": 7, "sequences": 2, "k1": 3.0, "k3": 1.0, "ratio_tokens": 4, "ratio_sequences": 3,
        "ratio": sum(ratios), "ratio_squared": sum(r * r for r in ratios),
    }  # fmt: skip

    def figures(sums):
        result = StepResult(0.0, 1.0, (PartResult(sums),))
        return step_metrics(c, "main", c, 0, 0.1, [part], result)

    row = figures(sums)
    assert (row["truncation_rate"], row["repetition"]) == (0.75, 0.5)
    assert (row["k1_per_token"], row["k3_per_token"], row["ratio_mean"]) == (0.75, 0.25, 1.0)
    assert row["ratio_effective_sample_size"] == pytest.approx(9 / 3.5 / 3)
    assert "ratio_mean" not in figures({"tokens": 7, "sequences": 2})
