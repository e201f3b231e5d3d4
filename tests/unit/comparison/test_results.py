"""Plan, statistics, results and execution of comparisons."""

from __future__ import annotations

import io
import json
import re
from dataclasses import asdict

import numpy as np
import pytest
import yaml
from scipy import stats

from seqkd.cli import compare
from seqkd.cli.main import main
from seqkd.comparison import plan, results, runner
from seqkd.comparison.statistics import Estimate, difference, estimate, holm
from seqkd.console import show
from seqkd.errors import ConfigError, DataError
from seqkd.evaluation.intervals import Ratio
from tests.comparison_runs import write_comparison, write_evaluation
from tests.unit.config.test_config import MINIMAL

FILE = {
    "name": "some",
    "config": "base.yaml",
    "budget": {"kind": "prompts", "amount": 12},
    "seeds": [0, 7],
    "overrides": ["learner.lr=1e-3", "evaluation.every_steps=2"],
    "methods": {
        "sequence": [],
        "token": ["sampler=teacher", "learner.lr=1e-4"],
        "other": ["other.yaml", "steps=3"],
    },
}


@pytest.fixture
def write(tmp_path):
    def write(**changes):
        other = {**MINIMAL, "teacher": {"kind": "hf", "model": "another"}}
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(MINIMAL))
        (tmp_path / "other.yaml").write_text(yaml.safe_dump(other))
        file = tmp_path / "comparison.yaml"
        file.write_text(yaml.safe_dump({**FILE, **changes}, sort_keys=False))
        return file

    return write


def test_every_method_runs_with_every_seed_and_the_budget(write):
    file = write()
    comparison = plan.load(file)
    entries = plan.entries(comparison, file)
    assert [(e.method, e.seed) for e in entries] == [
        ("sequence", 0), ("token", 0), ("other", 0), ("sequence", 7), ("token", 7), ("other", 7)
    ]  # fmt: skip
    by = {(e.method, e.seed): e.config for e in entries}
    assert {c.budget.amount for c in by.values()} == {12}
    assert {c.seed for (_, seed), c in by.items() if seed == 7} == {7}
    assert by["sequence", 0].learner.lr == 1e-3 and by["token", 7].learner.lr == 1e-4
    assert by["token", 0].objective.kind == "sequence_forward_kl"
    assert by["other", 0].teacher.model == "another" and by["other", 0].steps == 3
    assert by["sequence", 0].steps * by["sequence", 0].prompts_per_step > 1e6
    assert len({e.directory for e in entries}) == 6
    assert entries[4].directory == plan.directory(entries) / "token-7"
    assert comparison.against == "sequence"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"baseline": "none"}, "baseline 'none' is not a method. Set it to one of sequence,"),
        ({"seeds": [1, 1]}, r"seeds \[1, 1\] has a duplicate"),
        ({"seeds": []}, "seeds"),
        ({"methods": {}}, "methods"),
        ({"methods": {"a/b": []}}, "methods"),
        ({"methods": {"a": ["sampler=nobody"]}}, "methods.a: .*sampler.*'nobody'"),
        ({"methods": {"a": ["learner.lt=1"]}}, "methods.a: .*unknown key"),
        ({"methods": {"a": ["missing.yaml"]}}, "methods.a: .*missing.yaml: no such file"),
        ({"overrides": ["steps"]}, "is not of the form key=value"),
        ({"budget": {"kind": "sampled_tokens", "amount": 5}, "methods": {"a": ["sampler=dataset"]}},
         "methods.a: .*budget.kind is 'sampled_tokens', but"),
        ({"budgets": 3}, "budgets: unknown key. Did you mean 'budget'"),
    ],
)  # fmt: skip
def test_invalid_comparisons_are_refused(write, changes, message):
    file = write(**changes)
    with pytest.raises(ConfigError, match=message):
        plan.entries(plan.load(file), file)


def test_an_estimate_by_hand():
    """Two seeds, four prompts with one sample each."""
    a, b = np.array([1.0, 2.0, 3.0, 6.0]), np.array([3.0, 2.0, 5.0, 6.0])
    result = estimate([Ratio(a, np.ones(4)), Ratio(b, np.ones(4))])
    assert result.of_seeds == (3.0, 4.0) and result.mean == 3.5
    of_prompts = np.var((a + b) / 2, ddof=1) / 4
    of_seeds = np.var([3.0, 4.0], ddof=1) / 2
    weighted = of_prompts * stats.t.ppf(0.975, 3) + of_seeds * stats.t.ppf(0.975, 1)
    width = weighted / np.sqrt(of_prompts + of_seeds)
    assert (result.low, result.high) == pytest.approx((3.5 - width, 3.5 + width))


def test_p_value_is_5_percent_at_the_bound_of_the_interval():
    """By definition, p is 0.05 if the distance of the mean from 0 is half the interval's width."""
    rng = np.random.default_rng(0)
    rows = rng.normal(0, 1, (3, 20))
    result = estimate([Ratio(row, np.ones(20)) for row in rows])
    at_bound = rows - rows.mean() + (result.high - result.mean)
    assert estimate([Ratio(row, np.ones(20)) for row in at_bound]).p == pytest.approx(0.05)


def test_one_seed_has_the_t_interval_over_prompts():
    values = np.random.default_rng(1).exponential(2.0, 30)
    result = estimate([Ratio(values, np.ones(30))])
    expected = stats.ttest_1samp(values, 0).confidence_interval()
    assert (result.low, result.high) == pytest.approx(tuple(expected))
    assert result.p == pytest.approx(stats.ttest_1samp(values, 0).pvalue)


def drawn(rng, seeds, prompts, below, effect=0.0):
    """Draw ratios with expected mean 2 + effect. Seeds, prompts and their interaction have random
    effects."""
    of_seed, of_prompt = rng.normal(0, 0.3, (seeds, 1)), rng.normal(0, 1.0, (1, prompts))
    values = 2.0 + effect + of_seed + of_prompt + rng.normal(0, 1.0, (seeds, prompts))
    return [Ratio(row * weights, weights) for row, weights in zip(values, below, strict=True)]


def test_coverage_of_the_intervals():
    """Coverage may exceed 95 % by a few percent; see :mod:`seqkd.comparison.statistics`."""
    rng = np.random.default_rng(2)
    held, prompts_alone = 0, 0
    for _ in range(1000):
        below = rng.uniform(5, 15, (4, 40))
        runs = drawn(rng, 4, 40, below)
        result = estimate(runs)
        held += result.low <= 2.0 <= result.high
        alone = estimate(runs[:1])
        prompts_alone += alone.low <= 2.0 <= alone.high
    assert 0.94 <= held / 1000 <= 0.99
    assert prompts_alone / 1000 < 0.93, (
        "intervals of one seed do not include the variation between seeds"
    )


@pytest.mark.parametrize("of_seeds", [0.0, 0.5, 0.9, 1.0])
def test_p_values_are_safe_for_every_share_of_the_variance_between_seeds(of_seeds):
    """Three seeds that agree by chance must not give many degrees of freedom: with 90 % of the
    variance between seeds, those of Welch and Satterthwaite give p < 0.05 in 7.8 % and p < 0.001 in
    1.5 % of these cases (``python scripts/intervals.py``)."""
    rng = np.random.default_rng(4)
    cases, seeds, prompts = 2000, 3, 48
    p = []
    for _ in range(cases):
        of_prompt = rng.normal(0, np.sqrt((1 - of_seeds) * prompts), prompts)
        of_seed = rng.normal(0, np.sqrt(of_seeds * seeds), (seeds, 1))
        result = estimate([Ratio(row, np.ones(prompts)) for row in of_prompt + of_seed])
        assert (result.low <= 0 <= result.high) == (result.p >= 0.05)
        p.append(result.p)
    levels = np.array([0.05, 0.01, 0.001])
    shares = (np.array(p)[:, None] < levels).mean(0)
    assert (shares < levels + 3 * np.sqrt(levels / cases)).all(), "three standard errors"


def test_error_rate_and_power_of_the_test():
    rng = np.random.default_rng(3)
    significant = {0.0: 0, 1.0: 0}
    for effect in significant:
        for _ in range(500):
            below = rng.uniform(5, 15, (4, 40))
            prompts = rng.normal(0, 3.0, (1, 40))  # the same for both, so they cancel
            a, b = (
                [
                    Ratio(r.above + prompts[0] * r.below, r.below)
                    for r in drawn(rng, 4, 40, below, e)
                ]
                for e in (effect, 0.0)
            )
            significant[effect] += difference(a, b).p < 0.05
    assert significant[0.0] / 500 < 0.06 and significant[1.0] / 500 > 0.5


def test_difference_uses_prompts_where_both_are_defined():
    first = Ratio(np.array([4.0, 0.0, 9.0]), np.array([2.0, 0.0, 1.0]))
    second = Ratio(np.array([3.0, 5.0, 0.0]), np.array([3.0, 1.0, 0.0]))
    assert difference([first], [second]).mean == 4 / 2 - 3 / 3


def test_equal_runs_have_no_difference():
    runs = [Ratio(np.array([1.0, 2.0]), np.ones(2)), Ratio(np.array([3.0, 5.0]), np.ones(2))]
    result = difference(runs, runs)
    assert (result.mean, result.low, result.high, result.p) == (0, 0, 0, 1)


def test_holms_adjustment_by_hand():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == {"a": 0.03, "b": 0.06, "c": 0.06}
    assert holm({"a": 0.6, "b": 0.5}) == {"a": 1.0, "b": 1.0}


def test_methods_are_compared_over_common_seeds(tmp_path):
    comparison, entries = write_comparison(tmp_path, missing=[("sft", 2), ("default", 0)])
    result = results.read(comparison, entries)
    (held_out,) = result.tables
    figure = "student_length"

    def mean(method, seed):
        entry = next(e for e in entries if (e.method, e.seed) == (method, seed))
        evaluation = json.loads((entry.directory / "evaluation.json").read_text())
        return evaluation["figures"]["main"][figure]["mean"]

    seeds = {"sft": (0, 1), "default": (1, 2), "rao_blackwell": (0, 1, 2)}
    for method, shared_seeds in seeds.items():
        assert held_out.figures[method][figure].of_seeds == pytest.approx(
            [mean(method, seed) for seed in shared_seeds]
        )
    change = held_out.differences["default"][figure]
    assert change.mean == pytest.approx(mean("default", 1) - mean("sft", 1))
    assert held_out.verdict("default", figure) == "one seed: not tested"
    baseline = json.loads((entries[0].directory / "evaluation.json").read_text())
    of_teacher = baseline["figures"]["main"]["teacher_length"]["mean"]
    assert held_out.figures[results.TEACHER][figure].of_seeds[0] == pytest.approx(of_teacher)
    assert "sft" not in held_out.differences
    assert result.problems == ["default, seed 0: not started.", "sft, seed 2: not started."]
    tested = held_out.differences.keys() - {results.TEACHER, results.INITIAL, "default"}
    p = {m: held_out.differences[m][figure].p for m in tested}
    assert {m: held_out.adjusted[m][figure] for m in tested} == holm(p), (
        "adjusted over the tested methods"
    )


@pytest.mark.parametrize(
    "p, mean, expected",
    [(0.2, 1.0, "not significant (p 0.2)"), (0.05, 1.0, "not significant (p 0.05)"),
     (0.049, 1.0, "higher (p 0.049)"), (1e-9, -1.0, "lower (p < 0.001)")],
)  # fmt: skip
def test_verdict_of_a_difference(p, mean, expected):
    estimates = {"m": {"f": Estimate(mean, 0, 0, 1.0, (1.0, 2.0))}}
    tables = results.Tables("", 1, [], estimates, estimates, {"m": {"f": p}})
    assert tables.verdict("m", "f") == expected


def test_different_prompts_are_refused(tmp_path):
    comparison, entries = write_comparison(tmp_path, seeds=[0])
    file = entries[1].directory / "data.json"
    file.write_text(file.read_text().replace("d1", "d2"))
    with pytest.raises(DataError, match=r"sft-0 and .*forward_kl-0 were measured on different"):
        results.read(comparison, entries)


def test_limitations_of_a_comparison_are_reported(tmp_path):
    comparison, entries = write_comparison(tmp_path, seeds=[0])
    first, second = entries[0].directory, entries[1].directory
    lines = (first / "metrics.jsonl").read_text().splitlines(keepends=True)[:-3]
    (first / "metrics.jsonl").write_text("".join(lines))
    config = yaml.safe_load((first / "config.yaml").read_text())
    config["steps"] = len(lines) - config["warmup"]["steps"]
    (first / "config.yaml").write_text(yaml.safe_dump(config))
    evaluation = json.loads((second / "evaluation.json").read_text())
    del evaluation["per_prompt"]
    (second / "evaluation.json").write_text(json.dumps(evaluation))
    spent = sum(json.loads(line)["learner_tokens"] for line in lines)
    result = results.read(comparison, entries)
    assert result.problems[:2] == [
        f"sft, seed 0: the run ended after {spent:g} of 25000 learner_tokens.",
        "token_forward_kl, seed 0: not measured on held-out prompts.",
    ]
    assert result.problems[2].startswith("There is only one seed")
    assert "token_forward_kl" not in result.tables[0].figures


def test_warnings_about_length_are_listed_by_method(tmp_path):
    comparison, entries = write_comparison(tmp_path, missing=[("default", 0)])
    others = [e for e in entries if e.method == "default" and e.seed]
    for entry in others:
        file = entry.directory / "evaluation.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"warnings": {"main": "short"}}))
    seeds = ", ".join(str(entry.seed) for entry in others)
    assert len(others) > 1
    assert results.read(comparison, entries).problems == [
        "default, seed 0: not started.",
        f"default, seed {seeds}: on held-out prompts, length or EOS rate is significantly away "
        "from the teacher's. Figures and fixes are in the report of each run.",
    ]


def test_tables_as_text_and_json(tmp_path):
    comparison, entries = write_comparison(tmp_path)
    result = results.read(comparison, entries)
    write_evaluation(entries[0].directory, "other", {"student": {"rougeL": [10.0, 30.0]}})
    out = io.StringIO()
    show(*results.render(results.read(comparison, entries)), file=out)
    text = out.getvalue()
    (held_out,) = result.tables
    expected = held_out.figures["default"]["reverse_kl_per_token"]
    line = next(line for line in text.splitlines() if line.startswith("  default "))
    assert f"{expected.mean:.3g} [{expected.low:.3g}, {expected.high:.3g}]" in line
    assert line.endswith(held_out.verdict("default", "reverse_kl_per_token"))
    assert re.search(r"^ROUGE-L \(0 to 100\)\n  sft +20 \[", text, re.MULTILINE)
    results.write(result, tmp_path)
    content = json.loads((tmp_path / "comparison.json").read_text())
    assert content["tables"]["held-out prompts"]["figures"]["default"]["reverse_kl_per_token"] == {
        **asdict(expected), "of_seeds": list(expected.of_seeds)
    }  # fmt: skip


@pytest.fixture
def finished(tmp_path):
    """Function that rewrites the file of a comparison, whose runs are finished, with changes."""
    write_comparison(tmp_path, seeds=[0])
    file = tmp_path / "study.yaml"
    before = yaml.safe_load(file.read_text())

    def again(**changes):
        file.write_text(yaml.safe_dump(before | changes, sort_keys=False))
        return str(file)

    return again


def test_finished_runs_are_not_repeated(finished, monkeypatch, capsys):
    monkeypatch.setattr(compare, "check_methods", lambda entries: None)
    monkeypatch.setattr(runner.Children, "run", lambda *_: pytest.fail("no command should run"))
    assert main(["compare", finished()]) == 0
    out = capsys.readouterr().out
    assert "[1/4] sft, seed 0:" in out and "steps in" in out and "comparison.json" in out


def test_finished_runs_continue_with_a_larger_budget(finished, monkeypatch):
    calls = []
    monkeypatch.setattr(compare, "check_methods", lambda entries: None)
    monkeypatch.setattr(runner.Children, "run", lambda _, entry, *call: calls.append(call) or True)
    main(["compare", finished(budget={"kind": "learner_tokens", "amount": 1e6})])
    assert len(calls) == 4
    assert all(call[0] == "train" and call[-1] == "--resume" for call in calls)


@pytest.mark.parametrize(
    "changes, message",
    [({"overrides": ["learner.lr=0.5"]}, r"learner.lr: .* -> 0.5"),
     ({"overrides": ["rollout.max_tokens=7"]}, r"rollout.max_tokens: .* -> 7")],
)  # fmt: skip
def test_runs_with_another_configuration_are_refused(finished, changes, message, capsys):
    assert main(["compare", finished(**changes)]) == 2
    printed = capsys.readouterr().err
    assert re.search(message, printed) and "sft-0" in printed and "Traceback" not in printed


def test_first_error_of_a_failed_run_is_printed(tmp_path, capsys):
    _, entries = write_comparison(tmp_path, seeds=[0])
    entry = entries[0]
    log = entry.directory.with_name("sft-0.log")
    log.write_text("error: of an earlier attempt\n")
    assert not runner.Children().run(entry, "train", "missing.yaml")
    printed = capsys.readouterr().err
    assert "error: seqkd train failed with exit code 2" in printed and str(log) in printed
    assert "missing.yaml: no such file" in printed and "earlier attempt" not in printed
    assert log.read_text().startswith("error: of an earlier attempt")
    assert runner.Children().run(entry, "train", "--help")
