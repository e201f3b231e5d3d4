"""Sampler alternating: whose completions a draw has, and its configuration."""

from __future__ import annotations

from seqkd.config.run import load
from seqkd.training.clock import Clock
from tests.conftest import ROOT
from tests.unit.training.test_rollouts import PROMPTS, source


def test_teacher_and_student_write_for_alternate_prompts():
    rollouts, workers = source("alternating", rollout={"samples_per_prompt": 2})
    (step,) = rollouts.draw([PROMPTS[:4]], 0, Clock()).steps
    writers = {prompt: {r.source for r in step if r.prompt_id == prompt} for prompt in "0123"}
    assert writers == {"0": {"teacher"}, "1": {"student"}, "2": {"teacher"}, "3": {"student"}}
    assert len(step) == 8 and rollouts.fraction is None
    assert rollouts.scored, "the default objective needs the teacher's distribution"
    assert len(workers.student.calls) == len(workers.teacher_sampler.calls) == 1


def test_its_configuration():
    config = load(ROOT / "configs" / "alternating.yaml")
    assert config.objective.kind == "token_forward_kl"
    assert not config.draws_ahead(config)
