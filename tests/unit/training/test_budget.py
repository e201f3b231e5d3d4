"""Budgets: cost of steps, end of a run, and the same end after losses."""

from __future__ import annotations

import json
import math

import pytest

from seqkd.config.run import Config
from seqkd.errors import ActorError, LearnerLost
from seqkd.protocols import Part
from seqkd.training.budget import cost, expected_steps
from seqkd.types import Counts, Rollout
from tests.unit.config.test_config import MINIMAL
from tests.unit.training.test_recovery import CONFIG, Crash, World, left


def budgeted(kind, amount, **changes):
    data = CONFIG.model_dump(mode="json") | {"budget": {"kind": kind, "amount": amount}}
    return Config.model_validate(data | {"steps": 1000} | changes)


def rollout(source, tokens, cut=False):
    ids = tuple(range(tokens))
    return Rollout("p", f"p/{source}/{tokens}", (1,), ids, None, source, 0,
                   "length" if cut else "stop")  # fmt: skip


def part(*rollouts, scored=False, masked=()):
    return Part(rollouts, {"some": None} if scored else {}, Counts(1, 1), (), masked=masked)


def test_the_cost_of_a_step():
    phase = CONFIG.model_copy(update={"prompts_per_step": 3})
    parts = [
        part(rollout("student", 5), rollout("teacher", 7), scored=True,
             masked=[rollout("student", 11, cut=True)]),
        part(rollout("teacher", 13)),
        part(rollout("dataset", 17), scored=True),
        part(rollout("corpus", 19)),
    ]  # fmt: skip
    assert cost(phase, parts, 2.5) == {
        "prompts": 12,
        "sampled_tokens": 5 + 7 + 11 + 13,
        "learner_tokens": 5 + 7 + 13 + 17 + 19,
        "teacher_tokens": (7 + 13) + (5 + 7 + 11 + 17),
        "seconds": 2.5,
    }


# A warm-up step samples 2 prompts, each with one teacher completion of 2 tokens. A step of the main
# phase samples 3 prompts with 2 student completions each, which are scored, and 3 prompts with 2
# teacher completions each.
WARMUP, MAIN = {"prompts": 2, "sampled_tokens": 4}, {"prompts": 6, "sampled_tokens": 24}


@pytest.mark.parametrize("kind", WARMUP)
@pytest.mark.parametrize("draws", [1, 2, 3])
def test_a_run_ends_with_the_draw_that_spends_the_budget(tmp_path, kind, draws):
    """A draw has two steps. The budget is exhausted within the last draw."""
    world = World(tmp_path, config=budgeted(kind, 3 * WARMUP[kind] + (2 * draws - 1) * MAIN[kind]))
    world.finish()
    rows, _ = left(tmp_path)
    assert [row["phase"] for row in rows] == ["warmup"] * 3 + ["main"] * 2 * draws
    assert [row[kind] for row in rows] == [WARMUP[kind]] * 3 + [MAIN[kind]] * 2 * draws
    assert "in all, at most 1000 steps" in world.out.getvalue()
    assert "/1003 " not in world.out.getvalue(), "the end is estimated from the first step on"


def test_steps_end_a_run_before_its_budget(tmp_path):
    World(tmp_path, config=budgeted("prompts", 1e6, steps=3)).finish()
    assert len(left(tmp_path)[0]) == 3 + 3


def test_the_learning_rate_decays_with_the_budget(tmp_path):
    schedule = {"schedule": "linear", "min_lr_ratio": 0.0, "lr_warmup_steps": 0, "lr": 1.0}
    amount = 3 * WARMUP["sampled_tokens"] + 10 * MAIN["sampled_tokens"]
    World(tmp_path, config=budgeted("sampled_tokens", amount, learner=schedule)).finish()
    rates = [row["lr"] for row in left(tmp_path)[0][3:]]
    assert rates == pytest.approx([1 - i / 9 for i in range(10)])


def test_the_steps_that_a_budget_allows():
    config = budgeted("sampled_tokens", 100.0)
    assert expected_steps(config, config.warmup, 2, {}) == config.warmup.steps
    assert expected_steps(config, config, 0, {"warmup": {"sampled_tokens": 20.0}}) == 1000
    spent = {"warmup": {"sampled_tokens": 20.0}, "main": {"sampled_tokens": 30.0}}
    assert expected_steps(config, config, 4, spent) == round(4 * 80 / 30)
    spent["main"] = {"sampled_tokens": 79.0}
    assert expected_steps(config, config, 4, spent) == 5, "the rest of the budget allows one step"
    spent["main"] = {"sampled_tokens": 80.0}
    assert expected_steps(config, config, 4, spent) == 4
    assert expected_steps(config, config, 0, {"warmup": {"sampled_tokens": 100.0}}) == 0


@pytest.fixture(scope="module")
def measuring():
    return budgeted("sampled_tokens", 100.0, evaluation={"prompts": 1, "every_steps": 2})


@pytest.fixture(scope="module")
def quiet(tmp_path_factory, measuring):
    directory = tmp_path_factory.mktemp("quiet")
    world = World(directory, config=measuring)
    measured = world.finish()
    rows, student = left(directory)
    # 12 tokens of the warm-up and 24 per later step are 108 with the fourth. The student is
    # measured only between two draws, and not again at the start of a phase.
    assert len(rows) == 3 + 4
    assert list(measured) == ["initial", "step 2", "warmup", "main"]
    return (rows, student), measured, world.lives.calls


def published(directory):
    """Return the stages of evaluation.json."""
    file = directory / "evaluation.json"
    return list(json.loads(file.read_text())["figures"]) if file.exists() else []


def same(measured, expected):
    assert measured.keys() == expected.keys()
    for stage, measurement in expected.items():
        for name, values in measurement.sums.items():
            assert (measured[stage].sums[name] == values).all(), (stage, name)


def test_a_run_that_is_killed_at_any_call_ends_where_its_budget_does(quiet, measuring, tmp_path):
    files, expected, calls = quiet
    for at, call in enumerate(calls):
        directory = tmp_path / str(at)
        directory.mkdir()
        with pytest.raises(Crash):
            World(directory, at, Crash(), config=measuring).finish()
        stages = published(directory)
        assert stages == list(expected)[: len(stages)], "published during the run"
        measured = World(directory, config=measuring).finish()
        assert left(directory) == files, (at, call)
        same(measured, expected)
        assert published(directory) == list(expected)


def test_a_run_that_loses_its_learner_ends_where_its_budget_does(quiet, measuring, tmp_path):
    files, expected, calls = quiet
    for at, call in enumerate(calls):
        if call == "step":
            directory = tmp_path / str(at)
            directory.mkdir()
            lost = LearnerLost(ActorError("learner died"), gone=True)
            same(World(directory, at, lost, config=measuring).finish(), expected)
            assert left(directory) == files, at


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sampler": "dataset", "budget": {"kind": "sampled_tokens", "amount": 5}},
         "budget.kind is 'sampled_tokens', but objective 'sft'"),
        ({"sampler": "dataset", "budget": {"kind": "teacher_tokens", "amount": 5}},
         "budget.kind is 'teacher_tokens', but objective 'sft'"),
        ({"warmup": {"sampler": "teacher", "steps": 5, "prompts_per_step": 4},
          "budget": {"kind": "prompts", "amount": 20}},
         "budget.amount is 20 prompts, but the warm-up alone uses 20"),
        ({"budget": {"kind": "prompts", "amount": 0}}, "greater than 0"),
        ({"budget": {"kind": "words", "amount": 5}}, "'prompts', 'sampled_tokens'"),
    ],
)  # fmt: skip
def test_an_ineffective_budget_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Config.model_validate({**MINIMAL, **changes})


def test_scored_tokens_count_as_teacher_tokens(tmp_path):
    data = {"sampler": "dataset", "objective": {"kind": "token_forward_kl"},
            "budget": {"kind": "teacher_tokens", "amount": 5}}  # fmt: skip
    assert Config.model_validate({**MINIMAL, **data}).budget.amount == 5


def test_an_infinite_budget_is_refused():
    with pytest.raises(ValueError):
        Config.model_validate({**MINIMAL, "budget": {"kind": "prompts", "amount": math.inf}})
