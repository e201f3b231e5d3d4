"""ROUGE, self-BLEU, distinct-n and repetition against numbers worked by hand."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest

from seqkd.evaluation.intervals import ratio
from seqkd.evaluation.text import distinct, per_prompt, repeated, rouge, self_bleu, without_eos
from seqkd.types import Rollout


def rollout(ids, finish_reason="stop"):
    return Rollout("p", "p/student/0/0", (9,), tuple(ids), None, "student", 0, finish_reason)


def test_rouge_by_hand():
    found = rouge(
        [["the cat sat on the mat"], ["the cat"]],
        [["the cat was on the mat"], ["the cat sat on the mat"]],
    )
    # Six words each, 5 shared, 3 of 5 bigrams, "the cat on the mat" in order; then precision 1
    # with recalls 2/6, 1/5 and 2/6.
    assert found.rouge1.values == pytest.approx([100 * 5 / 6, 50])
    assert found.rouge2.values == pytest.approx([60, 100 / 3])
    assert found.rougeL.values == pytest.approx([100 * 5 / 6, 50])


def test_rouge_stems_and_knows_no_case_or_punctuation():
    found = rouge([["Jumping, walked!"]], [["jumps walking"]])
    assert found.rouge2.values == (100,)


def test_rouge_takes_the_best_reference_for_each_variant_and_sample():
    found = rouge([["a b c d"]], [["d c b a", "a b x y"]])
    assert found.rouge1.values == pytest.approx([100])  # of the first: the second has 50
    assert found.rouge2.values == pytest.approx([100 / 3])  # of the second: the first has 0
    assert found.rougeL.values == pytest.approx([50])  # of the second: the first has 25
    both = rouge([["a b", "x y"]], [["a b", "x y"]])
    assert both.rouge1.values == pytest.approx([100]), "each sample has a best one of its own"


def test_rouge_is_the_mean_over_samples_and_0_for_an_empty_one():
    found = rouge([["a b", "", "a c"]], [["a b"]])
    assert found.rouge1.values == pytest.approx([(100 + 0 + 50) / 3])


def test_rouge_leaves_out_what_has_no_reference():
    found = rouge(
        [["a"], ["b"], ["c"], ["天气很好"]],
        [[], ["b", "..."], ["", " ?!"], ["天气很好"]],
    )
    assert found.rouge1.values == (100,)
    assert (found.rouge1.prompts, found.rouge1.left_out) == ((1,), 3)
    assert rouge([["a"]], [[]]).rouge1.interval() is None


def test_predictions_and_references_must_be_of_the_same_prompts():
    with pytest.raises(ValueError, match="longer"):
        rouge([["a"]], [["a"], ["b"]])


def test_self_bleu_by_hand():
    one, other = "the cat sat on the mat", "the cat sat on a mat"
    # Clipped precisions both ways: 5/6, 3/5, 2/4, 1/3; equal lengths.
    bleu = 100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25
    assert self_bleu([[one, other]]).values == pytest.approx([bleu])


def test_self_bleu_is_against_the_other_samples_alone():
    same, apart = "a b c d", "w x y z"
    found = self_bleu([[same, same, apart], [apart], [apart, "e f g h"]])
    assert found.values == pytest.approx([200 / 3, 0])
    assert (found.prompts, found.left_out) == ((0, 2), 1)


def test_self_bleu_of_short_texts_is_of_the_n_grams_that_they_have():
    assert self_bleu([["yes indeed", "yes indeed"]]).values == pytest.approx([100])


def test_self_bleu_with_one_sample_is_not_defined():
    assert self_bleu([["a"], ["b"]]).interval() is None


def test_distinct_by_hand():
    completions = [[1, 2, 1, 2], [1, 2, 3]]
    assert distinct(completions, 1) == 3 / 7
    assert distinct(completions, 2) == 3 / 5  # 12 21 12, 12 23: none of them 2 then 1 across
    assert distinct(completions, 3) == 1
    assert distinct([[1], [2]], 2) is None
    assert distinct([[5, 5, 5]], 1) == 1 / 3


def test_the_token_that_ends_a_completion_is_not_spoken():
    assert without_eos(rollout([4, 5, 0])) == (4, 5)
    assert without_eos(rollout([4, 5, 6], "length")) == (4, 5, 6)


def test_repetition_of_each_prompt():
    found = repeated([[rollout([7] * 8), rollout([1, 2, 3, 4, 5])], [rollout([1, 2, 0])]])
    assert found.values == (4 / 7,)
    assert (found.prompts, found.left_out) == ((0,), 1)


def test_an_interval_is_the_bootstrap_over_the_prompts_that_are_left():
    found = per_prompt([3.0, None, 0.0, 7.0])
    assert found.interval() == ratio(np.array([3.0, 0.0, 7.0]), np.ones(3))
    assert found.prompts == (0, 2, 3)


def test_all_is_plain_data():
    found = asdict(rouge([["a"], ["b"]], [["a"], []]))
    assert json.loads(json.dumps(found, allow_nan=False))["rougeL"] == {
        "values": [100.0],
        "prompts": [0],
        "left_out": 1,
    }
