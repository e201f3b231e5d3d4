"""Positions in the teacher caches, and cost estimates at the start of a phase."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from seqkd.learner.running_costs import RunningCosts
from seqkd.training.checkpoint import FeedState, Progress
from seqkd.training.context import phase_spans
from seqkd.training.feed import RolloutFeed
from seqkd.training.positions import ReplayPositions
from tests.unit.teachers.test_cache import PROMPTS, Sampler, cache, sampler
from tests.unit.training.test_recovery import World


def test_a_restored_position_reads_the_same_completions_again(tmp_path):
    cached = sampler(Sampler(), cache(tmp_path))
    log = SimpleNamespace(position=dict, resume=lambda position: None)
    positions = ReplayPositions({"": cached}, log)
    first = cached.sample(PROMPTS[:1], [2], 0)
    saved = positions.current()
    second = cached.sample(PROMPTS[:1], [2], 1)
    positions.restore(saved)
    assert cached.sample(PROMPTS[:1], [2], 2) == second != first
    positions.restore({})
    assert cached.sample(PROMPTS[:1], [2], 3) == first


def test_a_phase_starts_without_the_costs_of_the_phase_before(tmp_path):
    run = World(tmp_path).run
    main = phase_spans(run.config)[1]
    for step, kept in ((main.first, False), (main.first + 2, True)):
        costs = RunningCosts()
        costs.update(torch.ones(2), torch.ones(2))
        state = FeedState(running={"student": costs})
        with RolloutFeed(run, main, Progress(step, feed=state)):
            assert state.running["student"].known == kept
