"""What a comparison runs, and what it concludes."""

from __future__ import annotations

import io
import json
import re

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


def test_every_method_is_run_with_every_seed_until_the_budget_is_spent(write):
    file = write()
    comparison = plan.load(file)
    found = plan.entries(comparison, file)
    assert [(e.method, e.seed) for e in found] == [
        ("sequence", 0), ("token", 0), ("other", 0), ("sequence", 7), ("token", 7), ("other", 7)
    ]  # fmt: skip
    by = {(e.method, e.seed): e.config for e in found}
    assert {c.budget.amount for c in by.values()} == {12}
    assert {c.seed for (_, seed), c in by.items() if seed == 7} == {7}
    assert by["sequence", 0].learner.lr == 1e-3 and by["token", 7].learner.lr == 1e-4
    assert by["token", 0].objective.kind == "sequence_forward_kl"
    assert by["other", 0].teacher.model == "another" and by["other", 0].steps == 3
    assert by["sequence", 0].steps * by["sequence", 0].prompts_per_step > 1e6
    assert len({e.directory for e in found}) == 6
    assert found[4].directory == plan.directory(found) / "token-7"
    assert comparison.against == "sequence"


@pytest.mark.parametrize(
    "changes, told",
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
def test_what_cannot_be_compared_is_refused(write, changes, told):
    file = write(**changes)
    with pytest.raises(ConfigError, match=told):
        plan.entries(plan.load(file), file)


def test_an_estimate_by_hand():
    """Two seeds, four prompts with one sample each."""
    a, b = np.array([1.0, 2.0, 3.0, 6.0]), np.array([3.0, 2.0, 5.0, 6.0])
    found = estimate([Ratio(a, np.ones(4)), Ratio(b, np.ones(4))])
    assert found.of_seeds == (3.0, 4.0) and found.mean == 3.5
    of_prompts = np.var((a + b) / 2, ddof=1) / 4
    of_seeds = np.var([3.0, 4.0], ddof=1) / 2
    freedom = (of_prompts + of_seeds) ** 2 / (of_prompts**2 / 3 + of_seeds**2 / 1)
    width = stats.t.ppf(0.975, freedom) * np.sqrt(of_prompts + of_seeds)
    assert (found.low, found.high) == pytest.approx((3.5 - width, 3.5 + width))


def test_the_p_of_a_bound_of_the_interval():
    """By definition: of a mean that lies as far from 0 as the interval is wide it is 0.05."""
    rng = np.random.default_rng(0)
    rows = rng.normal(0, 1, (3, 20))
    found = estimate([Ratio(row, np.ones(20)) for row in rows])
    at_bound = rows - rows.mean() + (found.high - found.mean)
    assert estimate([Ratio(row, np.ones(20)) for row in at_bound]).p == pytest.approx(0.05)


def test_one_seed_is_the_t_interval_over_prompts():
    values = np.random.default_rng(1).exponential(2.0, 30)
    found = estimate([Ratio(values, np.ones(30))])
    expected = stats.ttest_1samp(values, 0).confidence_interval()
    assert (found.low, found.high) == pytest.approx(tuple(expected))
    assert found.p == pytest.approx(stats.ttest_1samp(values, 0).pvalue)


def drawn(rng, seeds, prompts, below, effect=0.0):
    """Ratios whose mean is 2 + effect in expectation: seeds and prompts have effects of their
    own, and each prompt of each seed one more."""
    of_seed, of_prompt = rng.normal(0, 0.3, (seeds, 1)), rng.normal(0, 1.0, (1, prompts))
    values = 2.0 + effect + of_seed + of_prompt + rng.normal(0, 1.0, (seeds, prompts))
    return [Ratio(row * weights, weights) for row, weights in zip(values, below, strict=True)]


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Errs towards wider intervals, by what is told in the module: at most some percent."""
    rng = np.random.default_rng(2)
    held, prompts_alone = 0, 0
    for _ in range(1000):
        below = rng.uniform(5, 15, (4, 40))
        runs = drawn(rng, 4, 40, below)
        found = estimate(runs)
        held += found.low <= 2.0 <= found.high
        alone = estimate(runs[:1])
        prompts_alone += alone.low <= 2.0 <= alone.high
    assert 0.94 <= held / 1000 <= 0.985
    assert prompts_alone / 1000 < 0.93, "what one seed cannot know"


def test_a_difference_is_found_as_often_as_it_should_be():
    rng = np.random.default_rng(3)
    found = {0.0: 0, 0.8: 0}
    for effect in found:
        for _ in range(500):
            below = rng.uniform(5, 15, (4, 40))
            prompts = rng.normal(0, 3.0, (1, 40))  # the same for both, so it does not matter
            a, b = (
                [
                    Ratio(r.above + prompts[0] * r.below, r.below)
                    for r in drawn(rng, 4, 40, below, e)
                ]
                for e in (effect, 0.0)
            )
            found[effect] += difference(a, b).p < 0.05
    assert found[0.0] / 500 < 0.06 and found[0.8] / 500 > 0.5


def test_a_difference_is_of_the_prompts_that_both_have():
    ours = Ratio(np.array([4.0, 0.0, 9.0]), np.array([2.0, 0.0, 1.0]))
    theirs = Ratio(np.array([3.0, 5.0, 0.0]), np.array([3.0, 1.0, 0.0]))
    assert difference([ours], [theirs]).mean == 4 / 2 - 3 / 3


def test_the_same_has_no_difference():
    runs = [Ratio(np.array([1.0, 2.0]), np.ones(2)), Ratio(np.array([3.0, 5.0]), np.ones(2))]
    found = difference(runs, runs)
    assert (found.mean, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_holms_adjustment_by_hand():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == {"a": 0.03, "b": 0.06, "c": 0.06}
    assert holm({"a": 0.6, "b": 0.5}) == {"a": 1.0, "b": 1.0}


def test_methods_are_compared_over_the_seeds_that_both_have(tmp_path):
    comparison, entries = write_comparison(tmp_path, missing=[("sft", 2), ("default", 0)])
    result = results.read(comparison, entries)
    (held_out,) = result.tables
    figure = "student_length"

    def mean(method, seed):
        entry = next(e for e in entries if (e.method, e.seed) == (method, seed))
        found = json.loads((entry.directory / "evaluation.json").read_text())
        return found["figures"]["main"][figure]["mean"]

    seeds = {"sft": (0, 1), "default": (1, 2), "rao_blackwell": (0, 1, 2)}
    for method, of in seeds.items():
        assert held_out.figures[method][figure].of_seeds == pytest.approx(
            [mean(method, seed) for seed in of]
        )
    found = held_out.differences["default"][figure]
    assert found.mean == pytest.approx(mean("default", 1) - mean("sft", 1))
    assert held_out.verdict("default", figure) == "one seed: not tested"
    baseline = json.loads((entries[0].directory / "evaluation.json").read_text())
    of_teacher = baseline["figures"]["main"]["teacher_length"]["mean"]
    assert held_out.figures[results.TEACHER][figure].of_seeds[0] == pytest.approx(of_teacher)
    assert "sft" not in held_out.differences
    assert result.problems == ["default, seed 0: not started.", "sft, seed 2: not started."]
    tested = held_out.differences.keys() - {results.TEACHER, results.INITIAL, "default"}
    p = {m: held_out.differences[m][figure].p for m in tested}
    assert {m: held_out.adjusted[m][figure] for m in tested} == holm(p), "of those that are tested"


@pytest.mark.parametrize(
    "p, mean, said",
    [(0.2, 1.0, "not significant (p 0.2)"), (0.05, 1.0, "not significant (p 0.05)"),
     (0.049, 1.0, "higher (p 0.049)"), (1e-9, -1.0, "lower (p < 0.001)")],
)  # fmt: skip
def test_a_verdict(p, mean, said):
    of = {"m": {"f": Estimate(mean, 0, 0, 1.0, (1.0, 2.0))}}
    assert results.Tables("", 1, [], of, of, {"m": {"f": p}}).verdict("m", "f") == said


def test_other_prompts_are_not_compared(tmp_path):
    comparison, entries = write_comparison(tmp_path, seeds=[0])
    file = entries[1].directory / "data.json"
    file.write_text(file.read_text().replace("d1", "d2"))
    with pytest.raises(DataError, match=r"sft-0 and .*forward_kl-0 were measured on different"):
        results.read(comparison, entries)


def test_what_makes_a_comparison_less_than_it_looks_is_said(tmp_path):
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
    found = results.read(comparison, entries)
    assert found.problems[:2] == [
        f"sft, seed 0: the run ended after {spent:g} of 25000 learner_tokens.",
        "token_forward_kl, seed 0: nothing was measured on held-out prompts.",
    ]
    assert found.problems[2].startswith("There is one seed")
    assert "token_forward_kl" not in found.tables[0].figures


def test_the_tables_in_words(tmp_path):
    comparison, entries = write_comparison(tmp_path)
    result = results.read(comparison, entries)
    write_evaluation(entries[0].directory, "other", {"student": {"rougeL": [10.0, 30.0]}})
    out = io.StringIO()
    show(*results.render(results.read(comparison, entries)), file=out)
    text = out.getvalue()
    (held_out,) = result.tables
    of = held_out.figures["default"]["reverse_kl_per_token"]
    line = next(line for line in text.splitlines() if line.startswith("  default "))
    assert f"{of.mean:.3g} [{of.low:.3g}, {of.high:.3g}]" in line
    assert line.endswith(held_out.verdict("default", "reverse_kl_per_token"))
    assert re.search(r"^ROUGE-L \(0 to 100\)\n  sft +20 \[", text, re.MULTILINE)
    results.write(result, tmp_path)
    found = json.loads((tmp_path / "comparison.json").read_text())
    assert found["tables"]["held-out prompts"]["figures"]["default"]["reverse_kl_per_token"] == {
        "mean": of.mean, "low": of.low, "high": of.high, "p": of.p, "of_seeds": list(of.of_seeds)
    }  # fmt: skip


@pytest.fixture
def finished(tmp_path):
    """The file of a comparison whose runs are over, and how to write it anew."""
    write_comparison(tmp_path, seeds=[0])
    file = tmp_path / "study.yaml"
    before = yaml.safe_load(file.read_text())

    def again(**changes):
        file.write_text(yaml.safe_dump(before | changes, sort_keys=False))
        return str(file)

    return again


def test_what_is_over_is_not_run_again(finished, monkeypatch, capsys):
    monkeypatch.setattr(compare, "check_methods", lambda entries: None)
    monkeypatch.setattr(runner.Children, "run", lambda *_: pytest.fail("nothing is to be run"))
    assert main(["compare", finished()]) == 0
    out = capsys.readouterr().out
    assert "[1/4] sft, seed 0:" in out and "steps in" in out and "comparison.json" in out


def test_more_may_be_spent_by_runs_that_are_over(finished, monkeypatch):
    asked = []
    monkeypatch.setattr(compare, "check_methods", lambda entries: None)
    monkeypatch.setattr(runner.Children, "run", lambda _, entry, *of: asked.append(of) or True)
    main(["compare", finished(budget={"kind": "learner_tokens", "amount": 1e6})])
    assert len(asked) == 4 and all(of[0] == "train" and of[-1] == "--resume" for of in asked)


@pytest.mark.parametrize(
    "changes, told",
    [({"overrides": ["learner.lr=0.5"]}, r"learner.lr: .* -> 0.5"),
     ({"overrides": ["rollout.max_tokens=7"]}, r"rollout.max_tokens: .* -> 7")],
)  # fmt: skip
def test_runs_of_another_configuration_are_not_taken_for_these(finished, changes, told, capsys):
    assert main(["compare", finished(**changes)]) == 2
    said = capsys.readouterr().err
    assert re.search(told, said) and "sft-0" in said and "Traceback" not in said


def test_a_run_that_fails_is_said_with_its_first_error(tmp_path, capsys):
    _, entries = write_comparison(tmp_path, seeds=[0])
    entry = entries[0]
    log = entry.directory.with_name("sft-0.log")
    log.write_text("error: of an earlier attempt\n")
    assert not runner.Children().run(entry, "train", "missing.yaml")
    said = capsys.readouterr().err
    assert "error: seqkd train ended with exit code 2" in said and str(log) in said
    assert "missing.yaml: no such file" in said and "earlier attempt" not in said
    assert log.read_text().startswith("error: of an earlier attempt")
    assert runner.Children().run(entry, "train", "--help")
