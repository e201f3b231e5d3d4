"""Held-out measurement with prompts that an endpoint refuses."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from seqkd.errors import ModelError
from seqkd.evaluation.heldout import HeldOut
from seqkd.types import Prompt, Rollout, TeacherScore

PROMPTS = [Prompt(str(i), (i, 9), f"prompt {i}") for i in range(4)]


class Models:
    """Student, teacher, scorer and learner in one. It refuses to write for the prompts in
    ``silent``, and to score the student's completions of those in ``unscored``."""

    def __init__(self, silent=(), unscored=()):
        self.silent, self.unscored, self.asked = silent, unscored, []

    def sampler(self, source):
        def sample(prompts, samples, seed, *_):
            self.asked.append((source, [p.prompt_id for p in prompts]))
            self.seed = seed
            return [
                Rollout(p.prompt_id, f"{p.prompt_id}/{source}/{i}", p.token_ids,
                        () if refused else (int(p.prompt_id), 0), None, source, 0,
                        "refused" if refused else "stop")
                for p, n in zip(prompts, samples, strict=True)
                for i in range(n)
                for refused in [source == "teacher" and i == 1 and p.prompt_id in self.silent]
            ]  # fmt: skip

        return SimpleNamespace(sample=sample)

    def score(self, rollouts):
        assert all(r.completion_ids for r in rollouts)
        return {
            r.sample_id: TeacherScore(
                r.sample_id,
                logprobs=None
                if r.source == "student" and r.prompt_id in self.unscored
                else torch.zeros(2),
            )
            for r in rollouts
        }

    def measure(self, rollouts, scores, ends=()):
        names = ("student_logprob", "reverse_kl", "forward_kl")
        return {r.sample_id: dict.fromkeys(names, [1.0 + int(r.prompt_id)] * 2) for r in rollouts}


def held_out(models, seed=0):
    workers = SimpleNamespace(
        student=models.sampler("student"), teacher_sampler=models.sampler("teacher"),
        teacher=models, learner=models, distribution=True, live_teacher=True, sync=lambda: None,
    )  # fmt: skip
    return HeldOut(workers, PROMPTS, 2, seed, shown=4)


def test_prompts_that_the_teacher_refuses_are_not_measured():
    models = Models(silent=("1", "2"))
    measured = held_out(models).measure()
    assert models.asked[1] == ("student", ["0", "3"])
    assert measured.table()["reverse_kl_per_token"].mean == pytest.approx((1 + 4) / 2)
    assert measured.sums["sequences"].tolist() == [2, 2]
    assert [e.rollout.prompt_id for e in measured.teacher] == ["0", "3"]


def test_other_prompts_keep_their_seeds():
    models = Models(silent=("1",))
    held_out(models, seed=[10, 11, 12, 13]).measure()
    assert models.seed == [10, 12, 13]


def test_prompts_whose_score_is_refused_count_for_neither_model():
    measured = held_out(Models(unscored=("2",))).measure()
    assert measured.sums["sequences"].tolist() == [2, 2, 0, 2]
    for model in ("student", "teacher"):
        assert measured.sums[f"{model}_tokens"].tolist() == [4, 4, 0, 4]
    assert measured.table()["forward_kl_per_token"].mean == pytest.approx((1 + 2 + 4) / 3)
    assert [len(e.rollout.completion_ids) for e in measured.student] == [2, 2, 0, 2]


def test_without_any_answer_there_is_an_error():
    with pytest.raises(ModelError, match=r"teacher\.on_refusal: the endpoint refused all 4"):
        held_out(Models(silent=("0", "1", "2", "3")))
