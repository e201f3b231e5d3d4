"""Estimated cost of a step compared with the sizes of real models and with schedules by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from transformers import LlamaConfig, Qwen2Config

from seqkd.models.loading import skeleton
from seqkd.studies.step_cost import (
    LLAMA_8B,
    LLAMA_70B,
    NAMES,
    QWEN_1_5B,
    QWEN_7B,
    SMOLLM,
    Chip,
    Plan,
    Work,
    _finished,
    best,
    schedule,
    stages,
)

UNIT = Chip("", products=1e12, memory=1e9, link=1e9, moved=1e9, driver=1e9, number=2,
            learn=1.0, read=1.0, write=1.0)  # fmt: skip
WORK = Work(prompts=16, samples=4, prompt=100, completion=50, limit=80)
PLAN = Plan("", SMOLLM, SMOLLM, UNIT, WORK, engines=1, scorers=2, ranks=2, batch_tokens=720)


@pytest.mark.parametrize("shape", [SMOLLM, QWEN_1_5B, QWEN_7B, LLAMA_8B, LLAMA_70B])
def test_parameters_are_those_of_the_architecture(shape):
    """Biases and norms, less than a thousandth, are neglected."""
    kind = Qwen2Config if "Qwen" in shape.name else LlamaConfig
    model = skeleton(
        kind(
            hidden_size=shape.width, intermediate_size=shape.inner, num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads, num_key_value_heads=shape.key_values,
            head_dim=shape.head_width, vocab_size=shape.vocabulary, tie_word_embeddings=False,
        )
    )  # fmt: skip
    assert shape.head == model.lm_head.weight.numel()
    assert shape.body == pytest.approx(
        sum(p.numel() for p in model.model.layers.parameters()), 1e-3
    )


def test_operation_counts_match_a_calculation_by_hand():
    """Two operations per parameter and token in the forward pass, three times as many with the
    backward pass, and two products with every earlier token in attention."""
    tokens = 64 * (50 + 100)
    body = 2 * SMOLLM.body * tokens
    between = 2 * 2 * 30 * 9 * 64 * tokens * 75
    costs = stages(PLAN)
    assert costs.score["products"] == pytest.approx((body + between) / 2e12)
    assert costs.learn["products of layers"] == pytest.approx(3 * (body + between) / 2e12)
    heads = 4 * 2 * SMOLLM.head * 64 * 50
    assert costs.learn["products with heads"] == pytest.approx(heads / 2e12)
    assert costs.driver["teacher's states"] == pytest.approx(64 * 50 * 576 * 2 / 1e9)


def test_lengths_have_the_given_mean_and_limit():
    lengths = replace(WORK, prompts=400).lengths()
    assert lengths.mean() == pytest.approx(50, abs=0.1)
    assert lengths.min() >= 1
    assert lengths.max() == 80


def test_seats_are_filled_in_order():
    lengths = WORK.lengths()
    one = _finished(replace(PLAN, seats=1))
    assert np.array_equal(one.ravel(), lengths.ravel().cumsum())
    parallel = _finished(replace(PLAN, seats=64))
    assert np.array_equal(parallel, lengths)
    two = _finished(replace(PLAN, seats=2))
    assert two.max() >= lengths.sum() / 2
    assert two[0, 0] == lengths[0, 0]
    assert two[0, 2] == lengths[0, :2].min() + lengths[0, 2]


@pytest.mark.parametrize("plan", [PLAN, replace(PLAN, chip=replace(PLAN.chip, learn=0.001))])
def test_overlapping_stages_take_at_least_as_long_as_the_slower_one(plan):
    costs, steps = stages(plan), schedule(plan)
    sample, score, driver, sync, learn = (costs.seconds(name) for name in NAMES)
    assert steps.sequential == pytest.approx(sample + score + driver + sync + learn)
    rollouts = steps.split - sync - learn
    assert max(sample, score + driver) <= rollouts <= sample + score + driver
    loaded = costs.sync["loading"] + rollouts
    assert (loaded > learn) == (plan is PLAN)
    assert steps.prefetched == pytest.approx(costs.sync["publishing"] + max(loaded, learn))
    hidden = (sample + score + driver - rollouts) / (score + driver)
    assert steps.hidden == pytest.approx(hidden)
    at_the_end = schedule(replace(plan, batch_tokens=10**9))
    assert at_the_end.hidden == pytest.approx(0, abs=1e-9)


def test_best_returns_the_fastest_split():
    split = best(PLAN, 8)
    assert split.engines + split.scorers + split.ranks == 8
    assert schedule(split).prefetched == min(
        schedule(replace(PLAN, engines=e, scorers=s, ranks=8 - e - s)).prefetched
        for e in range(1, 7)
        for s in range(1, 8 - e)
    )
    assert best(replace(PLAN, teacher_chips=4), 8, least_ranks=2).scorers == 4
