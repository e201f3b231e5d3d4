"""Exposure bias, survival of completions and end calibration, computed by hand."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
from scipy import stats

from seqkd.evaluation.calibration import end_calibration
from seqkd.evaluation.curves import Lengths, TokenValues, compare_ends, exposure_bias, length_rates
from seqkd.evaluation.intervals import Interval, interval, ratio


def plain(result):
    """Return a result as it is read back from JSON."""
    return json.loads(json.dumps(asdict(result), allow_nan=False))


# --- exposure bias

T_1 = stats.t.ppf(0.975, 1)
"""Critical value with two prompts."""
STUDENT = TokenValues([[1, 2, 3], [2], [3, 4]], [0, 0, 1])
TEACHER = TokenValues([[1, 1, 1], [1, 3, 1]], [0, 1])


def test_exposure_bias_by_hand():
    result = exposure_bias(STUDENT, TEACHER)
    # Means over those alive: student 2 = (1+2+3)/3, then 3 = (2+4)/2; teacher 1, then 2.
    assert result.regret == pytest.approx([2, 5])
    assert result.expected == pytest.approx([1, 3])
    assert result.excess == pytest.approx([100, 200 / 3])
    assert (result.student_alive, result.teacher_alive) == ((3, 2), (2, 2))
    # The excess is 50 %, 75 % of the first prompt alone and 200 %, 75 % of the second.
    one, two = result.at
    assert (one.length, two.length) == (1, 2)
    width = T_1 * np.sqrt(1 / 2 * 2 * 75**2)
    assert asdict(one.percent) == pytest.approx(
        {"mean": 100, "low": 100 - width, "high": 100 + width}
    )
    assert asdict(two.percent) == pytest.approx(dict.fromkeys(("mean", "low", "high"), 200 / 3))
    assert plain(result)["at"][1]["length"] == 2


def test_equal_errors_on_both_texts_give_no_excess_at_any_length():
    cost = np.array([0.3, 0.1, 0.8, 0.2, 0.5, 0.4])
    short = TokenValues([cost[:n] for n in (2, 3, 4) * 8], list(range(24)))
    long = TokenValues([cost[:n] for n in (4, 5, 6) * 8], list(range(24)))
    for student, teacher in ((short, long), (long, short)):
        result = exposure_bias(student, teacher)
        assert result.excess == pytest.approx([0] * 3)
        assert all(abs(at.percent.low) + abs(at.percent.high) < 1e-9 for at in result.at)


def test_curves_end_where_too_few_prompts_remain():
    lengths = [5] * 9 + [4] + [3] * 20
    values = TokenValues([[1.0] * n for n in lengths], list(range(30)))
    forever = TokenValues([[1.0] * 9] * 30, list(range(30)))
    assert len(exposure_bias(values, forever).regret) == 4
    assert len(exposure_bias(forever, values).regret) == 4
    assert [at.length for at in exposure_bias(forever, forever).at] == [1, 2, 4, 8, 9]


def test_interval_from_the_figures_without_each_prompt():
    draw = np.random.default_rng(3)

    def completions():
        prompts = [i for i in range(12) for _ in range(2)]
        return TokenValues([draw.gamma(2, size=draw.integers(4, 8)) for _ in prompts], prompts)

    student, teacher = completions(), completions()

    def total(values, rows, length):
        sums = 0.0
        for t in range(length):
            here = [
                row[t]
                for row, prompt in zip(values.values, values.prompts, strict=True)
                if prompt in rows and len(row) > t
            ]
            sums += sum(here) / len(here)
        return sums

    def excess(rows, length):
        expected = total(teacher, rows, length)
        return 100 * (total(student, rows, length) - expected) / expected

    at = exposure_bias(student, teacher).at[2]
    assert at.length == 4
    everything = excess(range(12), 4)
    without = np.array([excess(set(range(12)) - {i}, 4) for i in range(12)])
    expected = interval(np.float64(everything), 11 * (everything - without))
    assert asdict(at.percent) == pytest.approx(asdict(expected))


def test_excess_is_undefined_without_errors():
    nothing = TokenValues([[0.0, 0.0], [0.0, 0.0]], [0, 1])
    result = plain(exposure_bias(nothing, nothing))
    assert result["excess"] == [None, None]
    assert [at["percent"] for at in result["at"]] == [None, None]


# --- survival

# Freireich et al. 1963, weeks in remission with 6-MP and with placebo: the textbook example.
TREATED = Lengths(
    [6, 6, 6, 7, 10, 13, 16, 22, 23, 6, 9, 10, 11, 17, 19, 20, 25, 32, 32, 34, 35],
    [True] * 9 + [False] * 12,
    list(range(21)),
)
PLACEBO = Lengths(
    [1, 1, 2, 2, 3, 4, 4, 5, 5, 8, 8, 8, 8, 11, 11, 12, 12, 15, 17, 22, 23],
    [True] * 21,
    list(range(21)),
)


def test_survival_matches_the_textbook_example():
    result = compare_ends(TREATED, PLACEBO)
    published = {
        5: 1.0, 6: 0.857, 7: 0.807, 10: 0.753, 13: 0.690, 16: 0.627, 22: 0.538, 23: 0.448,
        35: 0.448,
    }  # fmt: skip
    for weeks, share in published.items():
        assert result.student.survival[weeks] == pytest.approx(share, abs=5e-4)
    assert result.teacher.survival[8] == pytest.approx(8 / 21)
    assert result.teacher.survival[23:] == pytest.approx([0] * 13)
    assert result.student.hazard[5] == pytest.approx(3 / 21)
    assert result.horizon == 35
    # The largest gap is 64/85 - 4/21.
    assert result.largest_gap_at == 12
    assert result.largest_gap == pytest.approx(18 / 21 * 16 / 17 * 14 / 15 - 4 / 21)
    assert compare_ends(PLACEBO, TREATED).largest_gap == -result.largest_gap


def test_restricted_mean_by_hand():
    student = Lengths([2, 3, 4, 5], [True, False, True, False], [0, 1, 2, 3])
    teacher = Lengths([5, 5, 1, 1], [True, False, True, True], [0, 1, 2, 3])
    result = compare_ends(student, teacher)
    # The completion cut at 3 is not at risk later: of the 2 completions left at 4, one ends.
    assert result.student.survival == pytest.approx([1, 1, 0.75, 0.75, 0.375, 0.375])
    assert result.student.hazard == pytest.approx([0, 0.25, 0, 0.5, 0])
    assert result.student.restricted_mean.mean == pytest.approx(3.875)
    assert result.teacher.restricted_mean.mean == pytest.approx(3)
    assert result.mean_difference.mean == pytest.approx(0.875)
    assert (result.largest_gap, result.largest_gap_at) == (pytest.approx(0.5), 1)
    assert plain(result)["horizon"] == 5


def test_restricted_mean_is_the_mean_length_if_cuts_are_at_the_limit():
    draw = np.random.default_rng(1)
    prompts = [i for i in range(15) for _ in range(3)]
    lengths = [
        (tokens := np.minimum(draw.geometric(rate, len(prompts)), 20), tokens < 20)
        for rate in (0.05, 0.1)
    ]
    student, teacher = (Lengths(tokens, ended, prompts) for tokens, ended in lengths)
    result = compare_ends(student, teacher)
    sums = [np.bincount(prompts, tokens) for tokens, _ in lengths]
    threes = np.full(15, 3.0)
    same = {"rel": 1e-9}
    for restricted, expected in (
        (result.student.restricted_mean, ratio(sums[0], threes)),
        (result.teacher.restricted_mean, ratio(sums[1], threes)),
        (result.mean_difference, ratio(sums[0] - sums[1], threes)),
    ):
        assert asdict(restricted) == pytest.approx(asdict(expected), **same)


def test_survival_curves_end_at_the_shorter_known_length():
    everything_ends = Lengths([2, 7], [True, True], [0, 1])
    cut_at_4 = Lengths([1, 4], [True, False], [0, 1])
    result = compare_ends(everything_ends, cut_at_4)
    assert result.horizon == 4
    assert result.student.survival == pytest.approx([1, 1, 0.5, 0.5, 0.5])
    assert compare_ends(everything_ends, everything_ends).horizon == 7
    longer = compare_ends(
        Lengths([2, 3], [True, True], [0, 1]), Lengths([9, 9], [False] * 2, [0, 1])
    )
    assert longer.student.survival[3:] == (0,) * 7, "all completions have ended"


def test_rates_of_each_prompt():
    result = length_rates(Lengths([4, 8, 5], [True, False, True], [0, 0, 1]))
    assert result.length == (6, 5)
    assert result.ended == (0.5, 1)
    with pytest.raises(ValueError, match="prompt 1 of 3 has no completion"):
        length_rates(Lengths([4, 8], [True, False], [0, 2]))


# --- calibration of the end


def test_calibration_by_hand():
    probabilities = TokenValues([[0.05, 0.25, 0.5], [0.15, 0.95]], [0, 1])
    result = end_calibration(probabilities, [True, False])
    assert (result.states, result.observed_ends) == (5, 1)
    assert result.expected_ends == pytest.approx(1.9)
    # Excess ends: 0.8 - 1 for the first prompt, 1.1 for the second.
    width = T_1 * 0.65
    assert asdict(result.excess_ends) == pytest.approx(
        {"mean": 0.45, "low": 0.45 - width, "high": 0.45 + width}
    )
    first, second = math.log(0.95 * 0.75 * 0.5), math.log(0.85 * 0.05)
    mean = -(first + second) / 5
    width = T_1 * abs(first / 3 - second / 2) / 2
    assert asdict(result.log_loss) == pytest.approx(
        {"mean": mean, "low": mean - width, "high": mean + width}
    )
    assert result.constant_log_loss == pytest.approx(-0.2 * math.log(0.2) - 0.8 * math.log(0.8))
    assert result.calibration_error == pytest.approx((0.05 + 0.15 + 0.25 + 0.5 + 0.95) / 5)
    assert [(b.low, b.high, b.states, b.observed) for b in result.bins] == [
        (0.01, 0.1, 1, 0), (0.1, 0.2, 1, 0), (0.2, 0.3, 1, 0), (0.5, 0.6, 1, 1), (0.9, 1.0, 1, 0),
    ]  # fmt: skip
    assert plain(result)["bins"][0]["predicted"] == 0.05


def test_errors_cancel_within_a_bin_and_not_between_bins():
    probabilities = TokenValues([[0.62], [0.68], [0.1], [0.3]], [0, 0, 1, 1])
    result = end_calibration(probabilities, [True, False, False, True])
    middle = next(b for b in result.bins if b.low == 0.6)
    assert (middle.states, middle.observed) == (2, 0.5)
    assert middle.predicted == pytest.approx(0.65)
    assert result.calibration_error == pytest.approx((2 * 0.15 + 0.1 + 0.7) / 4)


def test_informed_end_probabilities_beat_the_constant_rate():
    sure = TokenValues([[0.001, 0.001, 0.99]] * 4, [0, 1, 2, 3])
    rate = TokenValues([[1 / 3] * 3] * 4, [0, 1, 2, 3])
    ended = [True] * 4
    assert end_calibration(sure, ended).log_loss.high < end_calibration(rate, ended).log_loss.low
    result = end_calibration(rate, ended)
    assert result.log_loss.mean == pytest.approx(result.constant_log_loss)
    assert result.calibration_error == pytest.approx(0), "although it is calibrated"
    assert result.excess_ends.mean == pytest.approx(0)


def test_probabilities_of_0_and_1_have_a_finite_loss():
    result = end_calibration(TokenValues([[0.0, 0.0], [1.0, 1.0]], [0, 1]), [True, False])
    assert result.log_loss.mean == pytest.approx(-3 * math.log(1e-7) / 4, rel=1e-6)
    assert [(b.low, b.states) for b in result.bins] == [(0.0, 2), (0.9, 2)]
    assert plain(result)["states"] == 4


def test_all_expected_ends_are_excess_without_observed_ends():
    result = end_calibration(TokenValues([[0.25, 0.25]], [0]), [False])
    assert result.excess_ends == Interval(0.5, 0.5, 0.5)
    assert result.constant_log_loss == pytest.approx(0, abs=1e-6)
