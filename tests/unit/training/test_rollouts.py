"""Completions that a step trains on: source, number and step."""

from __future__ import annotations

import threading
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from seqkd.config.run import Config
from seqkd.errors import ActorError, ModelError
from seqkd.learner.running_costs import RunningCosts
from seqkd.training.clock import Clock
from seqkd.training.rollouts import RolloutSource
from seqkd.types import Prompt, Rollout, TeacherScore
from tests.unit.config.test_config import MINIMAL

ZEROS = torch.zeros(2)
PROMPTS = [Prompt(str(i), (i,), "", (7, 0)) for i in range(12)]


class Sampler:
    """Fake engine whose completions are identified by their prompt's id."""

    def __init__(self, source):
        self.source, self.calls = source, []

    def sample(self, prompts, samples, seed, temperature, top_p, finished=None):
        self.calls.append((seed, dict(zip((p.prompt_id for p in prompts), samples, strict=True))))
        return [
            Rollout(p.prompt_id, f"{p.prompt_id}/{self.source}/{seed}/{i}", p.token_ids, (1, 2),
                    (-1.0, -2.0), self.source, 0, "stop")
            for p, n in zip(prompts, samples, strict=True)
            for i in range(n)
        ]  # fmt: skip

    def usage(self):
        return {"requests": len(self.calls)}


class Cutting(Sampler):
    """Sampler that truncates every second completion, and all completions of ``hopeless``
    prompts."""

    hopeless = ()

    def sample(self, prompts, *args):
        drawn = super().sample(prompts, *args)
        return [
            replace(r, finish_reason="length") if i % 2 or r.prompt_id in self.hopeless else r
            for i, r in enumerate(drawn)
        ]


class Early(Sampler):
    """Sampler that reports completions in a given order, and waits for ``seen`` before the last
    one."""

    def __init__(self, source, order, seen):
        super().__init__(source)
        self.order, self.seen = order, seen

    def sample(self, *args):
        drawn, finished = super().sample(*args), args[-1]
        for at in self.order[:-1]:
            finished(at // 2, drawn[at])
        assert self.seen.wait(30)
        finished(self.order[-1] // 2, drawn[self.order[-1]])
        return drawn


class Teacher:
    def __init__(self):
        self.batches, self.seen = [], threading.Event()

    def score(self, rollouts):
        self.batches.append([r.sample_id for r in rollouts])
        self.seen.set()
        return {r.sample_id: TeacherScore(r.sample_id, logprobs=ZEROS) for r in rollouts}


class Learner:
    def measure(self, rollouts, scores, ends=()):
        values = {"student_logprob": [-1.0, -1.0], "teacher_logprob": [-2.0, -3.0]}
        return {r.sample_id: values for r in rollouts}


def source(sampler, **changes):
    config = Config.model_validate({**MINIMAL, "sampler": sampler, **changes})
    workers = SimpleNamespace(
        student=Sampler("student"),
        teacher_sampler=Sampler("teacher"),
        teacher=Teacher(),
        learner=Learner(),
        sync=lambda: None,
        usage=dict,
    )
    return RolloutSource(config, config, sampler, workers), workers


def test_a_mixture_draws_each_sequence_from_one_of_the_two():
    s, workers = source("mixture", rollout={"samples_per_prompt": 50, "teacher_fraction": 0.3})
    drawn = s.draw([PROMPTS[:4], PROMPTS[4:8]], 0, Clock())
    assert s.fraction == 0.3
    for rollouts, prompts in zip(drawn.steps, (PROMPTS[:4], PROMPTS[4:8]), strict=True):
        assert {r.prompt_id for r in rollouts} == {p.prompt_id for p in prompts}
        assert len(rollouts) == 200
        share = sum(r.source == "teacher" for r in rollouts) / 200
        assert 0.2 <= share <= 0.4
    assert drawn.scores.keys() == {r.sample_id for step in drawn.steps for r in step}
    s.draw([PROMPTS[:4]], 1, Clock())
    (_, first), (_, second) = workers.teacher_sampler.calls
    assert {k: first[k] for k in second} != second, "drawn again at every step"


def test_several_steps_train_on_one_draw_in_order():
    s, workers = source("student", updates_per_rollout=3)
    batches = [PROMPTS[0:4], PROMPTS[4:8], [*PROMPTS[8:11], PROMPTS[0]]]
    drawn = s.draw(batches, 5, Clock())
    assert len(workers.student.calls) == 1
    ids = [[r.prompt_id for r in rollouts] for rollouts in drawn.steps]
    assert {*ids[1]} == {"4", "5", "6", "7"}
    assert ids[0].count("0") == ids[2].count("0") == 4, "a repeated prompt is sampled twice"
    assert {*ids[2]} == {"8", "9", "10", "0"}


def test_every_step_and_run_has_its_own_sampling_seed():
    """The plain seed is that of the held-out completions."""
    seeds = []
    for seed in range(3):
        s, workers = source("mixture", seed=seed)
        for step in range(40):
            s.draw([PROMPTS[:4]], step, Clock())
        by_step = {call[0] for call in workers.student.calls}
        assert len(by_step) == 40 and by_step >= {call[0] for call in workers.teacher_sampler.calls}
        seeds += by_step
    assert len(set(seeds)) == 120 and not set(seeds) & {0, 1, 2}


def test_the_first_step_estimates_costs_from_its_own_batch():
    s, _ = source("student", objective={"estimator": "reward_to_go", "normalization": "rate"})
    drawn = s.draw([PROMPTS[:4]], 0, Clock())
    assert (
        s.needs_costs
        and not source("student", objective={"estimator": "single_step"})[0].needs_costs
    )
    running = RunningCosts()
    running.update(*s.costs(drawn.steps[0], drawn.scores))
    counts = running.counts(drawn.steps[0])
    assert counts.rate == pytest.approx((1 + 2) / 2)
    assert counts.length == 2
    assert counts.costs.tolist() == [16, 32]


SPLIT = {
    "placement": "split",
    "rollout": {"samples_per_prompt": 2, "max_tokens": 32},
    "data": {**MINIMAL["data"], "max_prompt_tokens": 32},
    "teacher": {"kind": "hf", "model": "b", "batch_tokens": 200},
}
"""Split placement with a teacher batch of 200 tokens, which is filled by four completions of 64
tokens (3.1 of them)."""


@pytest.mark.parametrize("sampler", ["student", "mixture", "teacher"])
@pytest.mark.parametrize("order", [range(10), [9, 1, 8, 3, 6, 5, 4, 7, 2, 0]])
def test_finished_completions_are_scored_while_others_are_sampled(sampler, order):
    changes = {"rollout": {**SPLIT["rollout"], "teacher_fraction": 1e-9}}
    if sampler == "teacher":
        changes["objective"] = {"kind": "token_forward_kl"}
    s, workers = source(sampler, prompts_per_step=5, **SPLIT | changes)
    if sampler == "teacher":
        workers.student, workers.teacher_sampler = None, Early(sampler, order, workers.teacher.seen)
    else:
        workers.student = Early("student", order, workers.teacher.seen)
    drawn = s.draw([PROMPTS[:5]], 0, Clock())
    batches = [[int(i.split("/")[0]) for i in ids] for ids in workers.teacher.batches]
    assert sorted(batches) == [[0, 0, 1, 1], [2, 2, 3, 3], [4, 4]], "whatever the order"
    assert len(set(workers.teacher.batches[0])) == 4
    assert drawn.scores.keys() == {r.sample_id for r in drawn.steps[0]}


@pytest.mark.parametrize(
    ("sampler", "placement", "sizes"),
    [("student", "colocated", [10]), ("teacher", "split", [4, 4, 2])],
)
def test_the_same_batches_are_scored_without_early_completions(sampler, placement, sizes):
    """Colocated roles run alternately. A sampler such as a cache may report no early
    completions."""
    changes = {"placement": placement, "objective": {"kind": "token_forward_kl"}}
    s, workers = source(sampler, prompts_per_step=5, **SPLIT | changes)
    workers.student = Early("student", range(10), SimpleNamespace(wait=lambda _: True))
    s.draw([PROMPTS[:5]], 0, Clock())
    assert [len(batch) for batch in workers.teacher.batches] == sizes


def test_a_scoring_failure_during_sampling_ends_the_draw():
    s, workers = source("student", prompts_per_step=5, **SPLIT)
    workers.student = Early("student", range(10), workers.teacher.seen)
    fails = Mock(side_effect=[ActorError("teacher scoring died"), {}, {}])
    score = workers.teacher.score
    workers.teacher.score = lambda rollouts: score(rollouts) and fails()
    with pytest.raises(ActorError, match="teacher scoring died"):
        s.draw([PROMPTS[:5]], 0, Clock())


@pytest.mark.parametrize("sampler", ["dataset", "corpus"])
def test_reference_text_needs_no_sampler(sampler):
    changes = {"data": {**MINIMAL["data"], "corpus_path": "texts.jsonl"}}
    s, workers = source(sampler, **changes)
    drawn = s.draw([PROMPTS[:4]], 0, Clock())
    rollouts, masked, _ = s.split(drawn.steps[0], drawn.scores)
    assert [r.completion_ids for r in rollouts] == [(7, 0)] * 4
    assert {r.source for r in rollouts} == {sampler}
    assert drawn.scores == {} and not masked
    assert workers.student.calls == []


def test_truncated_completions_can_be_masked_out_of_the_loss():
    s, workers = source("student", rollout={"samples_per_prompt": 4, "mask_truncated": True})
    workers.student = Cutting("student")
    workers.student.hopeless = ("2", "3")
    drawn = s.draw([PROMPTS[:2], PROMPTS[2:4]], 0, Clock())
    rollouts, masked, _ = s.split(drawn.steps[0], drawn.scores)
    assert len(rollouts) == len(masked) == 4
    assert {r.finish_reason for r in rollouts} == {"stop"}
    assert {r.finish_reason for r in masked} == {"length"}
    assert {r.sample_id for r in (*rollouts, *masked)} == {r.sample_id for r in drawn.steps[0]}
    all_cut, none_masked, _ = s.split(drawn.steps[1], drawn.scores)
    assert len(all_cut) == 8 and not none_masked


class Refusing(Sampler):
    """Endpoint that refuses all completions of the prompts in ``refused``."""

    refused = ("1",)

    def sample(self, prompts, *args):
        return [
            replace(r, completion_ids=(), finish_reason="refused")
            if r.prompt_id in self.refused else r
            for r in super().sample(prompts, *args)
        ]  # fmt: skip


def test_refused_completions_and_scores_are_dropped_and_counted():
    changes = {"objective": {"kind": "token_forward_kl"}, "rollout": {"samples_per_prompt": 2}}
    s, workers = source("teacher", **changes)
    workers.teacher_sampler = Refusing("teacher")
    s.scored, score = True, workers.teacher.score

    def some(rollouts):
        scores = score(rollouts)
        return scores | {i: TeacherScore(i) for i in scores if i.startswith("2/")}

    workers.teacher.score = some
    drawn = s.draw([PROMPTS[:4]], 0, Clock())
    assert {i.split("/")[0] for i in workers.teacher.batches[0]} == {"0", "2", "3"}
    kept, masked, skipped = s.split(drawn.steps[0], drawn.scores)
    assert [r.prompt_id for r in kept] == ["0", "0", "3", "3"]
    assert (masked, skipped) == ([], 4)
    workers.teacher_sampler.refused = ("0", "1", "2", "3")
    drawn = s.draw([PROMPTS[:4]], 1, Clock())
    with pytest.raises(ModelError, match=r"teacher\.on_refusal: the endpoint refused all 8"):
        s.split(drawn.steps[0], drawn.scores)
