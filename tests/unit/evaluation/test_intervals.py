"""Intervals over prompts: by hand, and their coverage."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from seqkd.evaluation.catalog import limits
from seqkd.evaluation.intervals import Ratio, jackknife, paired_change, ratio
from seqkd.evaluation.table import Figures


def bounds(interval):
    return interval.low, interval.high


def test_interval_of_a_symmetric_mean_is_students():
    values = np.array([1.0, 2.0, 2.5, 4.0, 5.5, 6.0, 7.0])
    expected = stats.ttest_1samp(values, 0).confidence_interval()
    assert bounds(ratio(values, np.ones(7))) == pytest.approx(tuple(expected))


def test_interval_of_a_ratio_by_hand():
    """3/1, 4/3 and 5/2: without each of them 9/5, 8/4 and 7/4."""
    value, influences = jackknife(np.divide, np.array([3.0, 4.0, 5.0]), np.array([1.0, 3.0, 2.0]))
    assert value == 2
    assert influences == pytest.approx(
        np.array([2 * (2 - 9 / 5), 2 * (2 - 8 / 3), 2 * (2 - 7 / 4)])
    )
    result = ratio(np.array([3.0, 4.0, 5.0]), np.array([1.0, 3.0, 2.0]))
    width = stats.t.ppf(0.975, 2) * np.std(influences, ddof=1) / np.sqrt(3)
    # The low side is that of Student's t; the high side is extended, or the other way around.
    sides = 2 - result.low, result.high - 2
    assert min(sides) == pytest.approx(width) and max(sides) > width


def test_skewness_extends_the_side_of_the_long_tail():
    """Both bounds solve Hall's equation, g(t) = t + a t^2 / 3 + a^2 t^3 / 27 + a / 6."""
    values = np.random.default_rng(0).exponential(2.0, 30)
    low, high = bounds(ratio(values, np.ones(30)))
    student = stats.ttest_1samp(values, 0).confidence_interval()
    assert low == pytest.approx(student.low) and high > student.high
    assert bounds(ratio(-values, np.ones(30))) == pytest.approx((-high, -low))
    a = stats.skew(values) / np.sqrt(30)
    t = (values.mean() - high) / stats.sem(values)
    assert t + a * t**2 / 3 + a**2 * t**3 / 27 + a / 6 == pytest.approx(stats.t.ppf(0.025, 29))


def test_change_is_paired_over_prompts_where_both_are_defined():
    before = Ratio(np.array([10.0, 20, 30, 40, 0]), np.array([1.0, 1, 1, 1, 0]))
    after = Ratio(np.array([11.0, 22, 33, 42, 500]), np.ones(5))
    expected = stats.ttest_1samp([1, 2, 3, 2], 0).confidence_interval()
    assert bounds(paired_change(before, after)) == pytest.approx(tuple(expected))


def test_one_prompt_has_no_interval():
    assert bounds(ratio(np.array([6.0]), np.array([3.0]))) == (2.0, 2.0)


def test_bounds_are_cut_at_possible_values():
    figures = {
        "ended": Ratio(np.array([1.0, 0, 0, 0]), np.ones(4)),
        "rouge1": Ratio(np.array([90.0, 99, 99, 99]), np.ones(4)),
        "reverse_kl_per_token": Ratio(np.array([0.1, 0.1, 5, 0.1]), np.ones(4)),
        "bartscore_f": Ratio(-np.array([0.1, 0.1, 5, 0.1]), np.ones(4)),
        "forward_kl_per_token": Ratio(np.array([1e-9, -3e-9, 1e-9, -3e-9]), np.ones(4)),
    }
    raw = {name: ratio.interval() for name, ratio in figures.items()}
    table = Figures(figures, {}).table()
    assert raw["ended"].low < 0 and raw["ended"].high > 1 and raw["rouge1"].high > 100
    assert bounds(table["ended"]) == (0, 1)
    assert bounds(table["rouge1"]) == (raw["rouge1"].low, 100)
    assert bounds(table["reverse_kl_per_token"]) == (0, raw["reverse_kl_per_token"].high)
    assert table["bartscore_f"] == raw["bartscore_f"]
    rounding = table["forward_kl_per_token"]  # models that are equal but for rounding
    assert bounds(rounding) == (rounding.mean, raw["forward_kl_per_token"].high)
    assert limits("heldout/task_digits") == limits("student_eos_rate") == (0, 1)


@pytest.mark.parametrize("per", ["token", "sequence"])
def test_coverage_of_a_divergence_with_24_prompts(per):
    """The percentile bootstrap covers 0.921 and 0.930 (``python scripts/intervals.py``).
    Completions are cut at 48 tokens, which cost 0.85 nats on average."""
    rng = np.random.default_rng(1)
    tokens = np.minimum(rng.geometric(1 / 30, (8000, 24)), 48).astype(float)
    costs = rng.gamma(tokens * 0.5, 1.7)
    expected_length = (1 - (1 - 1 / 30) ** 48) * 30
    below, expected = (
        (tokens, 0.85) if per == "token" else (np.ones_like(tokens), 0.85 * expected_length)
    )
    covered = [low <= expected <= high for low, high in map(bounds, map(ratio, costs, below))]
    assert np.mean(covered) >= 0.945
