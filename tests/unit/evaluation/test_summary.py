"""Held-out figures and examples in evaluation.json."""

from __future__ import annotations

import pytest

from seqkd.evaluation.heldout import Example, Measurement
from seqkd.evaluation.intervals import Interval
from seqkd.evaluation.summary import evaluation_json
from seqkd.types import Prompt, Rollout


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(0.1, 2, "ex"), (-2, -0.1, "ex"), (0, 1, "in")]
)
def test_verdict_of_an_interval(low, high, verdict):
    assert Interval(0.5, low, high).verdict == f"{verdict}cludes 0"


def test_tokens_of_an_example_concatenate_to_its_text(tokenizer):
    """A character of several tokens is assigned to the last of them; each token keeps its cost."""
    import numpy as np

    ids = tuple(tokenizer("né €", add_special_tokens=False).input_ids)
    costs = tuple(float(i) for i in range(len(ids)))
    rollout = Rollout("a", "a/0", (1,), ids, None, "student", 0, "length")
    ones = {"sequences": np.ones(1), "student_tokens": np.ones(1), "teacher_tokens": np.ones(1)}
    ones |= {name: np.ones(1) for name in ("student_ended", "teacher_ended", "nll")}
    measurement = Measurement(ones, (Example(rollout, costs),), (Example(rollout),))
    evaluation = evaluation_json({"initial": measurement}, [Prompt("a", (1,), "a")], tokenizer, 1)
    tokens = evaluation["examples"][0]["tokens"]
    assert list(tokens) == ["teacher", "student before"], "there is no later student yet"
    assert len(ids) > len("né €"), "some character has several tokens"
    assert "".join(text for text, _ in tokens["student before"]) == tokenizer.decode(ids)
    assert [cost for _, cost in tokens["student before"]] == list(costs)
    assert [text for text, _ in tokens["student before"]].count("€") == 1
    assert {cost for _, cost in tokens["teacher"]} == {None}
