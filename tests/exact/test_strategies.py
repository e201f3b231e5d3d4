"""The strategy task: its data, its verdicts, and the training of all methods."""

from __future__ import annotations

import json

import pytest
import torch

from seqkd.studies import strategies as study

TASK = study.Task(digits=3, modulus=3, hard_share=0.7)
SMALL = study.Size(1, 32, 32)


def test_prompts_are_rendered_as_in_a_run():
    tokenizer = study.tokenizer(TASK)
    train, heldout = TASK.rows()
    assert len(train) + len(heldout) == 27 and len(heldout) == TASK.heldout == 7
    assert len({row["prompt"] for row in (*train, *heldout)}) == 27
    for row, ids in zip((*train, *heldout), TASK.prompts.tolist(), strict=True):
        message = [{"role": "user", "content": row["prompt"]}]
        text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        assert tokenizer(text, add_special_tokens=False).input_ids == ids
        assert row["answer"] == str(sum(map(int, row["prompt"].split())) % 3)


def test_both_strategies_end_with_the_answer():
    tokenizer, rows = study.tokenizer(TASK), [*TASK.rows()[0], *TASK.rows()[1]]
    places = torch.arange(27).repeat(2)
    hard = torch.arange(54) < 27
    completions = TASK.completions(places, hard)
    for place, ids, direct in zip(places, completions.tolist(), hard, strict=True):
        word, *numbers = tokenizer.decode(ids, skip_special_tokens=True).split()
        digits = list(map(int, rows[place]["prompt"].split()))
        sums = [str(sum(digits[:k]) % 3) for k in (2, 3)]
        assert (word, numbers) == (("direct", sums[1:]) if direct else ("steps", sums))
        assert ids.count(study.END_ID) == 1
    assert TASK.correct(places, completions).all()


def test_wrong_and_unfinished_completions_are_not_correct():
    places = torch.arange(27)
    completions = TASK.completions(places, torch.ones(27, dtype=torch.bool))
    number = completions[:, 1]
    other = completions.clone()
    other[:, 1] = (number - len(study.SPECIAL) + 1) % 3 + len(study.SPECIAL)
    assert not TASK.correct(places, other).any()
    unfinished = number[:, None].expand(-1, 3)
    assert not TASK.correct(places, unfinished).any()


@pytest.fixture(scope="module")
def models():
    start = study.model(TASK, study.Size(2, 32, 64), 0)
    teacher = study.train_teacher(TASK, 0, steps=150, batch=64, start=start)
    student = study.model(TASK, SMALL, 1)
    study.warm_up(student, teacher, TASK, 0, steps=20)
    return teacher, student


def test_the_teacher_has_the_share_of_strategies(models):
    teacher, _ = models
    outcome = study.describe(teacher, teacher, TASK)
    assert outcome.hard == pytest.approx(TASK.hard_share, abs=0.1)
    assert outcome.optimum == pytest.approx(outcome.hard, abs=1e-6), "there is no divergence"
    assert abs(outcome.reverse_kl) < 1e-5 > abs(outcome.forward_kl)


def test_the_optimum_prefers_the_strategy_with_the_smaller_divergence(models):
    """A student that can carry out neither strategy errs at more tokens of the longer one."""
    teacher, warm = models
    outcome = study.describe(warm, teacher, TASK)
    assert outcome.optimum > outcome.hard + 0.1


@pytest.mark.parametrize("name", study.METHODS)
def test_every_method_trains(models, name):
    teacher, warm = models
    student = study.copied(warm)
    study.train(student, teacher, TASK, study.METHODS[name], 0, steps=2, prompts=8)
    outcome = study.describe(student, teacher, TASK, samples=2)
    assert all(torch.isfinite(torch.tensor(value)) for value in vars(outcome).values())
    assert any(not a.equal(b) for a, b in zip(student.parameters(), warm.parameters(), strict=True))


def test_the_comparison_has_the_methods_of_the_study():
    from seqkd.comparison import plan
    from tests.conftest import ROOT

    comparison = plan.load(ROOT / "configs" / "comparisons" / "strategies.yaml")
    entries = plan.entries(comparison, ROOT / "configs" / "comparisons" / "strategies.yaml")
    assert set(study.METHODS) <= set(comparison.methods)
    for entry in entries:
        if entry.method in study.METHODS:
            on_student, objective = study.METHODS[entry.method]
            assert entry.config.objective == objective, entry.method
            assert (entry.config.sampler == "student") == on_student


def test_models_and_data_are_written(models, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    teacher, student = models
    study.save(tmp_path, TASK, {"teacher": teacher, "student": student})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    for name, value in student.state_dict().items():
        assert loaded.state_dict()[name].equal(value)
    assert loaded.generation_config.eos_token_id == study.END_ID
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "teacher")
    assert tokenizer.convert_ids_to_tokens(range(len(TASK.words))) == list(TASK.words)
    lines = (tmp_path / "heldout.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == TASK.rows()[1]
