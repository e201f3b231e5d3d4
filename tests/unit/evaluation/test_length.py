"""Warning about completions that end elsewhere than the teacher's."""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from itertools import cycle, islice

import numpy as np
import pytest

from seqkd.console import show
from seqkd.evaluation import offline, summary
from seqkd.evaluation.calibration import EndCalibration
from seqkd.evaluation.heldout import Answers, Measurement
from seqkd.evaluation.intervals import Interval
from seqkd.evaluation.length import compare, length_warning
from seqkd.evaluation.table import ModelOutputs, reference_lengths
from seqkd.evaluation.text import per_prompt
from seqkd.types import Prompt, Rollout

P, LIMIT, END = 30, 64, 9


def measurement(student, teacher):
    """Return a measurement with one completion per prompt. A completion of LIMIT tokens is cut."""
    sums = {"sequences": np.ones(len(student)), "nll": np.ones(len(student))}
    for who, lengths in (("student", student), ("teacher", teacher)):
        sums[f"{who}_tokens"] = np.array(lengths, float)
        sums[f"{who}_ended"] = (np.array(lengths) < LIMIT).astype(float)
    sums |= {name: sums[f"{who}_tokens"] for name, who in (("reverse_kl", "student"),
                                                         ("forward_kl", "teacher"))}  # fmt: skip
    return Measurement(sums, (), ())


def of_train(student, teacher, stage="main"):
    """Return evaluation.json of a run whose student has completions of these lengths."""
    before = measurement(teacher, teacher)
    stages = {"initial": before, stage: measurement(student, teacher)}
    return summary.evaluation_json(stages, ["prompt"] * len(student), None, 0)


def repeat(*lengths, prompts=P):
    return list(islice(cycle(lengths), prompts))


def test_warning_has_the_paired_difference_and_both_means():
    teacher, student = repeat(40, 44, 48), repeat(20, 26, 32)
    evaluation = of_train(student, teacher)
    change = evaluation["changes"]["student_length"]["teacher -> main"]
    assert change["mean"] == -18 and -20 <= change["low"] < -18 < change["high"] <= -16
    text = evaluation["warnings"]["main"]
    assert (
        "student completions are 18 tokens shorter than the teacher's (26 against 44, 95 % "
        f"interval of the difference {change['low']:.3g} to {change['high']:.3g})"
    ) in text
    assert "the divergences do not show this; likely causes: prompts of another kind" in text
    assert "docs/evaluation.md" in text and "end by themselves" not in text, "all of them end"
    assert evaluation["changes"]["student_eos_rate"]["teacher -> main"]["mean"] == 0
    json.dumps(evaluation)


def test_interval_is_paired_over_prompts():
    """Prompts differ by far more than the models do. The unpaired intervals overlap."""
    teacher = [10 + 1.5 * i for i in range(P)]
    student = [1.2 * n for n in teacher]
    evaluation = of_train(student, teacher)
    figures = evaluation["figures"]["main"]
    assert figures["student_length"]["low"] < figures["teacher_length"]["high"]
    assert "tokens longer than the teacher's" in evaluation["warnings"]["main"]
    assert "likely causes: normalization rate" in evaluation["warnings"]["main"]


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (repeat(40, 44, 48), repeat(44, 48, 40)),
        (repeat(20, 60), repeat(60, 20, 20, 60, 60, 60)),  # 14 % shorter, not significant
        (repeat(41), repeat(45)),  # significant, 9 % shorter
        (repeat(10, prompts=9), repeat(60, prompts=9)),  # too few prompts
        (repeat(LIMIT), repeat(LIMIT)),  # all cut
        (repeat(*[60] * 9, LIMIT, prompts=100), repeat(60, prompts=100)),  # EOS rate 0.9 against 1
    ],
)
def test_no_warning_if_not_significant_or_not_relevant(student, teacher):
    evaluation = of_train(student, teacher)
    assert evaluation["warnings"] == {}
    assert evaluation["changes"]["student_length"]["teacher -> main"], "always reported"


def test_significant_differences_below_the_threshold_are_visible_as_changes():
    evaluation = of_train(repeat(41), repeat(45))
    change = Interval(**evaluation["changes"]["student_length"]["teacher -> main"])
    assert change.verdict == "excludes 0"


def test_eos_rate_shows_the_difference_if_completions_are_cut():
    """Lengths are within 10 %, because most completions are cut at the same limit."""
    student, teacher = repeat(LIMIT - 4, LIMIT - 4, LIMIT), repeat(LIMIT)
    text = of_train(student, teacher)["warnings"]["main"]
    assert text.startswith(
        "66.7 % of the student's completions end by themselves against 0 % of the teacher's (95 % "
        "interval of the difference "
    )
    assert "tokens shorter" not in text
    text = of_train(teacher, student)["warnings"]["main"]
    assert text.startswith("0 % of the student's completions end by themselves against 66.7 %")
    assert "likely causes: normalization rate" in text


def test_both_findings_are_one_sentence():
    text = of_train(repeat(28), repeat(40, LIMIT, LIMIT))["warnings"]["main"]
    assert "than the teacher's (28 against 56," in text
    assert ", and 100 % of the student's completions end by themselves against 33.3 %" in text
    assert ". " not in text and "\n" not in text


def test_untrained_student_has_no_warning_and_the_last_stage_counts():
    """A pruned student writes other lengths before it is trained."""
    short, teacher = measurement(repeat(10), repeat(40)), measurement(repeat(40), repeat(40))

    def warnings(**stages):
        return summary.evaluation_json(stages, ["prompt"] * P, None, 0)["warnings"]

    assert warnings(initial=short) == {}
    assert warnings(initial=short, warmup=short, main=teacher) == {}
    assert warnings(initial=teacher, warmup=teacher, main=short).keys() == {"main"}
    assert warnings(**{"initial": teacher, "step 5": short}).keys() == {"step 5"}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_summary_prints_the_warning_in_red_after_the_divergences(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    evaluation, plain, terminal = of_train(repeat(20), repeat(40)), io.StringIO(), Terminal()
    show(*summary.render(evaluation), file=plain)
    lines = plain.getvalue().splitlines()
    (at,) = (i for i, line in enumerate(lines) if line.startswith("warning: student completions"))
    assert any(line.startswith("reverse KL per token, initial -> main") for line in lines[:at])
    assert lines[at - 2].startswith("completion length, teacher -> main: -20 [-20, -20]")
    show(*summary.render(evaluation), file=terminal)
    assert "\x1b[1;31mwarning: student completions are 20 tokens" in terminal.getvalue()
    show(*summary.render(of_train(repeat(40), repeat(40))), file=(silent := io.StringIO()))
    assert "warning" not in silent.getvalue()


# seqkd evaluate

PROMPTS = [Prompt(f"p{i}", (1,), f"p{i}") for i in range(P)]


def answers(lengths, **stats):
    rollouts = [
        Rollout(
            prompt.prompt_id, f"{prompt.prompt_id}/0", (1,),
            (5,) * (n - 1) + ((END,) if n < LIMIT else (5,)), None, "student", 0,
            "stop" if n < LIMIT else "length",
        )
        for prompt, n in zip(PROMPTS, lengths, strict=True)
    ]  # fmt: skip
    return Answers(
        rollouts,
        {r.sample_id: {k: [v] * len(r.completion_ids) for k, v in stats.items()} for r in rollouts},
    )


def of_evaluate(outputs, references=((),) * P):
    held_out = offline.PromptSet(
        PROMPTS, list(references), lambda ids: "x", lambda text: len(text.split()), LIMIT
    )
    figures = offline.figures_json(outputs, held_out, None)
    return figures | {"samples_per_prompt": 1}


def with_teacher(student, teacher, end_probability=None):
    ends = {} if end_probability is None else {"end_logprob": float(np.log(end_probability))}
    on_teacher = answers(teacher, student_logprob=-1.0, forward_kl=1.0, **ends)
    own = answers(student, student_logprob=-1.0, reverse_kl=1.0, teacher_logprob=-1.0)
    return {"teacher": ModelOutputs(answers(teacher)), "student": ModelOutputs(own, on_teacher)}


def test_evaluation_compares_the_student_with_the_teacher():
    evaluation = of_evaluate(with_teacher(repeat(20, 26, 32), repeat(40, 44, 48)))
    assert "18 tokens shorter than the teacher's (26 ag" in evaluation["warnings"]["student"]
    assert "expects" not in evaluation["warnings"]["student"], "ends are not measured"
    show(*offline.render(evaluation), file=(out := io.StringIO()))
    assert "\nwarning: student completions are 18 tokens shorter" in out.getvalue()
    assert of_evaluate(with_teacher(repeat(40, 44, 48), repeat(44, 40, 48)))["warnings"] == {}
    untrained = with_teacher(repeat(20), repeat(40))
    untrained["initial"] = untrained.pop("student")
    assert of_evaluate(untrained)["warnings"] == {}


def test_expected_ends_are_added_to_a_finding():
    evaluation = of_evaluate(with_teacher(repeat(20), repeat(40), 0.05))
    assert (
        "and on the teacher's text the student expects 60 ends where there are 30 (95 % interval "
        "of the difference per completion 1 to 1)"
    ) in evaluation["warnings"]["student"]
    well = of_evaluate(with_teacher(repeat(20), repeat(40), 1 / 40))
    assert "expects" not in well["warnings"]["student"]
    same_length = of_evaluate(with_teacher(repeat(40), repeat(40), 0.05))
    assert same_length["warnings"] == {}, "its own completions end where the teacher's do"


def test_expected_ends_count_if_every_completion_is_cut():
    text = of_evaluate(with_teacher(repeat(LIMIT), repeat(LIMIT), 0.01))["warnings"]["student"]
    assert text.startswith("on the teacher's text the student expects 19.2 ends where there are 0")
    assert of_evaluate(with_teacher(repeat(LIMIT), repeat(LIMIT), 0.001))["warnings"] == {}


def test_references_replace_a_missing_teacher():
    student = {"student": ModelOutputs(answers(repeat(21)))}
    assert of_evaluate(student)["warnings"] == {}, "there is nothing to compare with"
    references = [["w " * 39, "w " * 41]] * 20 + [[]] * 10
    evaluation = of_evaluate(student, references)
    text = evaluation["warnings"]["student"]
    assert "20 tokens shorter than the references (21 against 41," in text
    assert "no teacher was measured" in text and "divergences" not in text
    assert evaluation["changes"]["length"]["references -> student"]["mean"] == -20
    assert evaluation["figures"]["references"]["length"]["mean"] == 41
    measured = of_evaluate(with_teacher(repeat(21), repeat(21)), references)
    assert measured["warnings"] == {}, "the teacher counts, not the references"
    assert "references" not in measured["figures"]


def test_references_are_cut_at_the_limit_of_the_completions():
    table = reference_lengths([["a b", "a b c d"], []], lambda text: len(text.split()), 4).table()
    assert (table["length"].mean, table["ended"].mean) == ((3 + 4) / 2, 1 / 2)


def test_prompts_where_a_side_is_undefined_are_dropped():
    student, other = per_prompt([20.0] * 12).ratio(), per_prompt([None, 50.0] * 6).ratio()
    result = compare(student, other)
    assert (result.student, result.other, result.change.mean, result.prompts) == (20, 50, -30, 6)
    ended = compare(per_prompt([1.0] * 12).ratio(), per_prompt([None, 1.0] * 6).ratio())
    assert length_warning(result, ended) is None, "only 6 prompts"


def test_calibration_has_the_fields_that_the_warning_reads():
    ends = EndCalibration(1, 2, 3.0, Interval(1, 0.5, 2), Interval(0, 0, 0), 0.0, 0.0, ())
    same = compare(per_prompt([0.0] * P).ratio(), per_prompt([0.0] * P).ratio())
    assert "expects 3 ends where there are 2" in length_warning(same, same, asdict(ends))
