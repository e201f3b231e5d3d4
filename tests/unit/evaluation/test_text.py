"""ROUGE, self-BLEU, distinct-n and repetition against values computed by hand."""

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
    result = rouge(
        [["the cat sat on the mat"], ["the cat"]],
        [["the cat was on the mat"], ["the cat sat on the mat"]],
    )
    # Six words each, 5 shared, 3 of 5 bigrams, "the cat on the mat" in order; then precision 1
    # with recalls 2/6, 1/5 and 2/6.
    assert result.rouge1.values == pytest.approx([100 * 5 / 6, 50])
    assert result.rouge2.values == pytest.approx([60, 100 / 3])
    assert result.rougeL.values == pytest.approx([100 * 5 / 6, 50])


def test_rouge_stems_and_ignores_case_and_punctuation():
    result = rouge([["Jumping, walked!"]], [["jumps walking"]])
    assert result.rouge2.values == (100,)


def test_rouge_uses_the_best_reference_per_variant_and_sample():
    result = rouge([["a b c d"]], [["d c b a", "a b x y"]])
    assert result.rouge1.values == pytest.approx([100])  # first reference; the second has 50
    assert result.rouge2.values == pytest.approx([100 / 3])  # second reference; the first has 0
    assert result.rougeL.values == pytest.approx([50])  # second reference; the first has 25
    both = rouge([["a b", "x y"]], [["a b", "x y"]])
    assert both.rouge1.values == pytest.approx([100]), "each sample has its own best reference"


def test_rouge_is_the_mean_over_samples_and_0_for_empty_samples():
    result = rouge([["a b", "", "a c"]], [["a b"]])
    assert result.rouge1.values == pytest.approx([(100 + 0 + 50) / 3])


def test_rouge_skips_prompts_without_references():
    result = rouge(
        [["a"], ["b"], ["c"], ["天气很好"]],
        [[], ["b", "..."], ["", " ?!"], ["天气很好"]],
    )
    assert result.rouge1.values == (100,)
    assert (result.rouge1.prompts, result.rouge1.left_out) == ((1,), 3)
    assert rouge([["a"]], [[]]).rouge1.interval() is None


def test_predictions_and_references_must_have_the_same_length():
    with pytest.raises(ValueError, match="longer"):
        rouge([["a"]], [["a"], ["b"]])


def test_self_bleu_by_hand():
    one, other = "the cat sat on the mat", "the cat sat on a mat"
    # Clipped precisions both ways: 5/6, 3/5, 2/4, 1/3; equal lengths.
    bleu = 100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25
    assert self_bleu([[one, other]]).values == pytest.approx([bleu])


def test_self_bleu_excludes_the_sample_itself():
    same, apart = "a b c d", "w x y z"
    result = self_bleu([[same, same, apart], [apart], [apart, "e f g h"]])
    assert result.values == pytest.approx([200 / 3, 0])
    assert (result.prompts, result.left_out) == ((0, 2), 1)


def test_self_bleu_of_short_texts_uses_effective_order():
    assert self_bleu([["yes indeed", "yes indeed"]]).values == pytest.approx([100])


def test_self_bleu_is_undefined_for_one_sample():
    assert self_bleu([["a"], ["b"]]).interval() is None


def test_distinct_by_hand():
    completions = [[1, 2, 1, 2], [1, 2, 3]]
    assert distinct(completions, 1) == 3 / 7
    assert distinct(completions, 2) == 3 / 5  # 12 21 12, 12 23: no bigram spans two completions
    assert distinct(completions, 3) == 1
    assert distinct([[1], [2]], 2) is None
    assert distinct([[5, 5, 5]], 1) == 1 / 3


def test_without_eos_removes_the_end_of_sequence_token():
    assert without_eos(rollout([4, 5, 0])) == (4, 5)
    assert without_eos(rollout([4, 5, 6], "length")) == (4, 5, 6)


def test_repetition_of_each_prompt():
    result = repeated([[rollout([7] * 8), rollout([1, 2, 3, 4, 5])], [rollout([1, 2, 0])]])
    assert result.values == (4 / 7,)
    assert (result.prompts, result.left_out) == ((0,), 1)


def test_interval_is_over_defined_prompts():
    result = per_prompt([3.0, None, 0.0, 7.0])
    assert result.interval() == ratio(np.array([3.0, 0.0, 7.0]), np.ones(3))
    assert result.prompts == (0, 2, 3)


def test_scores_are_plain_data():
    result = asdict(rouge([["a"], ["b"]], [["a"], []]))
    assert json.loads(json.dumps(result, allow_nan=False))["rougeL"] == {
        "values": [100.0],
        "prompts": [0],
        "left_out": 1,
    }
