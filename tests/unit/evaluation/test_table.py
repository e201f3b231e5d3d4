"""The table of an evaluation, on completions whose figures can be worked out by hand."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest

from seqkd.console import show
from seqkd.evaluation.heldout import Answers
from seqkd.evaluation.intervals import Interval, Ratio
from seqkd.evaluation.table import Figures, ModelOutputs, changes, curves, figures, render
from seqkd.types import Prompt, Rollout

PROMPTS = [Prompt("a", (1,), "a"), Prompt("b", (2,), "b")]
WORDS = {5: "red", 6: "green", 7: "blue", 9: ""}
REFERENCES = [["red green", "blue"], []]
END = 9


def decode(ids):
    return " ".join(WORDS[i] for i in ids if WORDS[i])


def written(texts, costs, **stats):
    """``texts``: by prompt, the samples' token ids; each token costs so much of every statistic."""
    rollouts, measured = [], {}
    for prompt, samples in zip(PROMPTS, texts, strict=True):
        for i, ids in enumerate(samples):
            reason = "stop" if ids[-1] == END else "length"
            name = f"{prompt.prompt_id}/student/0/{i}"
            rollouts.append(
                Rollout(prompt.prompt_id, name, prompt.token_ids, ids, None, "student", 0, reason)
            )
            measured[name] = {stat: [value * costs] * len(ids) for stat, value in stats.items()}
    return Answers(rollouts, measured)


TEACHER = [[(5, END), (7, 7, 7, 7)], [(6, END), (6, 6, END)]]
STUDENT = [[(5, 6, END), (7, END)], [(6, 6, 6, 6), (6, END)]]


def student(costs=1.0):
    stats = {"reverse_kl": 2.0, "forward_kl": 3.0, "student_logprob": -1.0, "teacher_logprob": -4.0}
    ours = written(STUDENT, costs, **stats)
    theirs = written(TEACHER, costs, end_logprob=math.log(0.5), **stats)
    return ModelOutputs(ours, theirs)


def test_every_figure_by_hand():
    found = figures(student(), PROMPTS, REFERENCES, decode, None)
    table = {name: interval.mean for name, interval in found.table().items()}
    assert table["reverse_kl_per_token"] == 2.0
    assert table["reverse_kl_per_sequence"] == 2.0 * 11 / 4  # 3 + 2 + 4 + 2 tokens
    assert table["forward_kl_per_sequence"] == 3.0 * 11 / 4  # 2 + 4 + 2 + 3
    assert table["teacher_nll_per_token"] == 4.0
    assert table["perplexity"] == pytest.approx(math.e)
    # Prompt b has no reference; both samples of a have one that says the same.
    assert table["rouge1"] == table["rougeL"] == 100
    assert table["rouge2"] == 50  # one word has no pair of words
    assert found.ratios["rouge1"].below.tolist() == [1, 0]
    assert table["length"] == ((3 + 2) / 2 + (4 + 2) / 2) / 2
    assert table["ended"] == (1 + 0.5) / 2
    assert table["distinct1"] == 3 / 8  # red green blue, green four times, green
    assert table["distinct2"] == 2 / 4  # (5, 6) and (6, 6), without the ends
    assert table["repetition"] == 0
    assert not {"bartscore_f"} & table.keys()


def test_the_teacher_has_the_figures_of_its_text():
    theirs = student().on_teacher
    table = figures(ModelOutputs(theirs), PROMPTS, REFERENCES, decode, None).table()
    assert table["teacher_nll_per_token"].mean == 4.0
    assert table["length"].mean == ((2 + 4) / 2 + (2 + 3) / 2) / 2
    assert not {"reverse_kl_per_token", "perplexity"} & table.keys()


def test_changes_are_paired():
    before = figures(student(2.0), PROMPTS, REFERENCES, decode, None)
    after = figures(student(1.0), PROMPTS, REFERENCES, decode, None)
    found = changes(before, after)
    assert found["reverse_kl_per_token"].mean == found["reverse_kl_per_token"].high == -2.0
    assert (found["rouge1"].mean, found["rouge1"].low, found["rouge1"].high) == (0, 0, 0)
    assert "perplexity" not in found


def test_changes_are_of_the_prompts_that_both_have():
    before = Ratio(np.array([4.0, 0.0, 9.0]), np.array([2.0, 0.0, 1.0]))
    after = Ratio(np.array([3.0, 5.0, 0.0]), np.array([3.0, 1.0, 0.0]))
    found = changes(Figures({"rouge1": before}, {}), Figures({"rouge1": after}, {}))
    assert found == {"rouge1": Interval(-1.0, -1.0, -1.0)}
    nowhere = Ratio(np.array([0.0, 5.0, 0.0]), np.array([0.0, 1.0, 0.0]))
    assert changes(Figures({"rouge1": before}, {}), Figures({"rouge1": nowhere}, {})) == {}


def test_curves_know_what_they_are_given():
    found = curves(student(), PROMPTS)
    assert found["exposure_bias"]["excess"][0] == 0, "the same error on both texts"
    ends = found["end_calibration"]
    assert (ends["states"], ends["observed_ends"]) == (11, 3)
    assert ends["expected_ends"] == pytest.approx(0.5 * 11)
    assert found["ends"]["student"]["survival"][0] == 1
    without = ModelOutputs(written(STUDENT, 1.0), written(TEACHER, 1.0))
    assert curves(without, PROMPTS).keys() == {"ends"}


def test_the_table_has_a_column_a_model_and_a_dash_where_nothing_is_known():
    table = {
        "teacher": figures(
            ModelOutputs(student().on_teacher), PROMPTS, REFERENCES, decode, None
        ).table(),
        "student": figures(student(), PROMPTS, REFERENCES, decode, None).table(),
    }
    out = io.StringIO()
    show(render(table), file=out)
    lines = out.getvalue().splitlines()
    assert lines[0].split() == ["teacher", "student"]
    row = next(line for line in lines if line.startswith("reverse KL per token"))
    assert row.split()[-2:] == ["-", "2"]
    assert any(line.startswith("distinct-1") for line in lines)
