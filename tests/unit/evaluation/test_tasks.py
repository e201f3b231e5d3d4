"""Accuracy at tasks: verdicts, figures, tables and refused configurations."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest

from seqkd.comparison import results
from seqkd.config.run import Config
from seqkd.config.tasks import TaskConfig
from seqkd.console import show
from seqkd.errors import DataError
from seqkd.evaluation.catalog import labeled, metric, title
from seqkd.evaluation.heldout import HeldOut
from seqkd.evaluation.summary import evaluation_json, render
from seqkd.evaluation.table import ModelOutputs, figures
from seqkd.evaluation.tasks import Tasks, check_tasks, correct, result
from seqkd.types import Rollout
from tests.comparison_runs import write_comparison
from tests.unit.config.test_config import MINIMAL
from tests.unit.evaluation.test_table import PROMPTS, STUDENT, TEACHER, decode, written

INTEGER = r"-?[0-9]+"
WORDS = Tasks({"color": TaskConfig()}, {"a": ["a pale green", "blue"]}, decode)
"""Prompt a has the answers "green" and "blue" by their last words; prompt b has none."""


@pytest.mark.parametrize(
    "pattern, text, last",
    [
        (r"\S+", "it is 12 ", "12"),
        (INTEGER, "3 + 4 = -7.", "-7"),
        (r"answer: (\w+)", "answer: no, answer: yes, surely", "yes"),
        (INTEGER, "none", None),
    ],
)
def test_the_result_is_the_last_match(pattern, text, last):
    assert result(text, pattern) == last


def test_a_completion_is_correct_if_it_ended_with_the_result_of_any_answer():
    def verdict(text, answers, reason="stop"):
        rollout = Rollout("a", "a/0", (1,), (2,), None, "student", 0, reason)
        return correct(TaskConfig(pattern=INTEGER), rollout, text, answers)

    assert verdict("steps 4 1 3", ["3"]) and verdict("so 3.", ["5", "#### 3"])
    assert not verdict("direct 13", ["3"])
    assert not verdict("3 or 4", ["3"])
    assert not verdict("none", ["3"])
    assert not verdict("steps 4 1 3", ["3"], "length"), "a truncated completion has no result"


def measured():
    """Return the measurement of a stand-in run on the completions of the table's tests."""

    def sampler(texts):
        return SimpleNamespace(sample=lambda *_: written(texts, 1.0).rollouts)

    def measure(rollouts, scores, ends):
        return {r.sample_id: {"student_logprob": [-1.0] * 9} for r in rollouts}

    workers = SimpleNamespace(
        teacher_sampler=sampler(TEACHER),
        student=sampler(STUDENT),
        sync=lambda: None,
        distribution=False,
        learner=SimpleNamespace(measure=measure),
    )
    return HeldOut(workers, PROMPTS, 2, 0, 1, WORDS).measure()


def test_held_out_accuracy_of_student_and_teacher():
    """Student: "red green" and "blue" are correct. Teacher: "red" is not, and "blue blue blue blue"
    is truncated."""
    ratios = measured().ratios()
    assert ratios["task_color"].above.tolist() == [1.0, 0.0]
    assert ratios["task_color"].below.tolist() == [1.0, 0.0], "prompt b has no answer"
    assert ratios["task_color"].interval().mean == 1.0
    assert ratios["teacher_task_color"].interval().mean == 0.0
    assert next(iter(ratios)) == "task_color"


def test_a_run_reports_accuracy_first_with_its_change(tokenizer):
    stages = {"initial": measured(), "main": measured()}
    evaluation = evaluation_json(stages, PROMPTS, SimpleNamespace(decode=lambda *_, **__: ""), 0)
    assert next(iter(evaluation["changes"])) == "task_color"
    out = io.StringIO()
    show(*render(evaluation), file=out)
    lines = out.getvalue().splitlines()
    assert [line.split("  ")[0].strip() for line in lines[3:5]] == [
        "accuracy, color (share)", "teacher's accuracy, color (share)",
    ]  # fmt: skip
    assert "accuracy, color, initial -> main: 0 [0, 0]" in out.getvalue()


def test_seqkd_evaluate_measures_accuracy():
    references = [["a pale green", "blue"], []]
    outputs = ModelOutputs(written(STUDENT, 1.0), None)
    table = figures(outputs, PROMPTS, references, decode, None, WORDS).table()
    assert table["task_color"].mean == 1.0
    assert "task_color" not in figures(outputs, PROMPTS, references, decode, None).table()


def test_a_prompt_without_completions_has_no_accuracy():
    """An endpoint may refuse a prompt."""
    assert WORDS.accuracy([]) == {"color": None}


def test_labels():
    assert labeled("task_sum") == "accuracy, sum (share)"
    assert title("heldout/task_sum") == "Accuracy, sum"
    assert metric("task_sum").better == "higher"
    assert labeled("teacher_task_sum") == "teacher's accuracy, sum (share)"


def test_a_comparison_shows_accuracy_first_and_the_teachers(tmp_path):
    import json

    comparison, entries = write_comparison(tmp_path, {"a": [], "b": []}, seeds=(0, 1))
    for entry in entries:
        file = entry.directory / "evaluation.json"
        evaluation = json.loads(file.read_text())
        for stage in evaluation["per_prompt"].values():
            ones = stage["student_eos_rate"]["below"]
            halves = [0.5 * (entry.method == "b") for _ in ones]
            stage["task_sum"] = {"above": halves, "below": ones}
            stage["teacher_task_sum"] = {"above": ones, "below": ones}
        file.write_text(json.dumps(evaluation))
    (tables,) = results.read(comparison, entries).tables
    assert tables.names[0] == "task_sum" and "teacher_task_sum" not in tables.names
    assert tables.tasks == ["task_sum"]
    accuracy = {method: row["task_sum"].mean for method, row in tables.figures.items()}
    assert accuracy == {"(teacher)": 1.0, "(before)": 0.0, "a": 0.0, "b": 0.5}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tasks": {"sum": {"pattern": "("}}}, r"'\(' is not a regular expression: .*Correct it"),
        ({"tasks": {"sum": {"pattern": "(a)(b)"}}}, "has 2 groups, but one group marks the result"),
        ({"tasks": {"a/b": {}}}, "a/b"),
        ({"tasks": {"sum": {}}, "prompts": 0}, "evaluation.tasks has sum, but evaluation.prompts"),
    ],
)
def test_invalid_tasks_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Config.model_validate({**MINIMAL, "evaluation": changes})


def test_answers_without_a_result_are_refused():
    check_tasks({}, {})
    check_tasks({"sum": TaskConfig(pattern=INTEGER)}, {"a": ["3"]})
    with pytest.raises(DataError, match=r"evaluation\.tasks: no held-out prompt has an answer"):
        check_tasks({"sum": TaskConfig()}, {})
    with pytest.raises(DataError, match=r"tasks.sum.pattern: .*does not match the answer 'three'"):
        check_tasks({"sum": TaskConfig(pattern=INTEGER)}, {"a": ["3"], "b": ["three"]})
