"""The uniform teacher: its scores, its completions, and the configuration that names it."""

from __future__ import annotations

import math

import pytest

from actors.build import TEACHER_ACTORS
from actors.placement import plan
from actors.uniform_teacher import UniformSampler, UniformScorer
from seqkd.config.run import load
from seqkd.types import Prompt, Rollout
from tests.conftest import ROOT


def test_every_token_is_equally_probable():
    scorer = UniformScorer()
    scorer.start(8)
    rollout = Rollout("p", "p/0", (1,), (2, 3, 4), None, "student", 0, "stop")
    (score,) = scorer.score([rollout])
    assert score.logprobs.tolist() == pytest.approx([-math.log(8)] * 3)


def test_a_completion_ends_at_a_stop_token_or_at_the_limit():
    sampler = UniformSampler((0,))
    sampler.start(4)
    prompt = Prompt("p", "text", (1, 2), None)
    drawn = [r for *_, r in sampler.sample([prompt], [0], [50], 6, 1.0, 1.0)]
    assert {r.finish_reason for r in drawn} == {"stop", "length"}
    for r in drawn:
        assert (r.completion_ids[-1] == 0) == (r.finish_reason == "stop")
        assert 0 not in r.completion_ids[:-1] and len(r.completion_ids) <= 6


def test_its_configuration_has_actors_and_a_plan():
    config = load(ROOT / "configs" / "uniform.yaml")
    assert config.teacher.kind in TEACHER_ACTORS
    assert config.teacher.local is None and not config.teacher.distribution
    assert len(plan(config).role("teacher")) == 1
