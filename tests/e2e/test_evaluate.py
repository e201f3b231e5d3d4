"""Evaluation of a model by real actors, on prompts with several answers."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest

from tests.conftest import ROOT
from tests.fork_server import python

ROWS = [
    {"instruction": "Name a color.", "instances": [{"input": "", "output": "red"}]},
    {"prompt": "Say yes."},
    {
        "instruction": "Name a bird.",
        "instances": [{"input": "a big one", "output": ["owl", "emu"]}],
    },
]


def evaluate(*arguments):
    command = [*python(), "-m", "seqkd", "evaluate", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)


def test_a_model_and_its_teacher(tiny, tiny_config, tmp_path):
    prompts = tmp_path / "set.jsonl"
    rows = [ROWS[0], ROWS[2]]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--config", str(tiny_config), "--prompts", str(prompts), "--samples", "2"]
    out = tmp_path / "out"
    done = evaluate(tiny["student"], *options, "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((out / "evaluation.json").read_text())
    assert (result["prompts"], result["with_references"], result["samples_per_prompt"]) == (2, 2, 2)
    figures = result["figures"]
    assert figures.keys() == {"teacher", "student"}
    assert figures["student"]["reverse_kl_per_token"]["mean"] > 1
    assert figures["student"]["perplexity"]["mean"] > 100
    assert "reverse_kl_per_token" not in figures["teacher"]
    assert result["curves"]["student"].keys() == {"ends", "exposure_bias", "end_calibration"}
    states = result["curves"]["student"]["end_calibration"]["states"]
    rows = [json.loads(line) for line in (out / "generations.jsonl").read_text().splitlines()]
    assert [row["references"] for row in rows] == [["red"], ["owl", "emu"]]
    assert all(len(row["teacher"]) == len(row["student"]) == 2 for row in rows)
    assert 4 <= states <= 2 * 2 * 32
    assert not (out / "cache").exists()


def test_other_figures_are_computed_with_another_tokenizer(tiny, tiny_config, tmp_path, tokenizer):
    """The teacher cannot be compared with, so only the text is evaluated, with the references in
    place of the teacher, and the reason is printed."""
    from transformers import AutoTokenizer

    other = tmp_path / "other"
    shutil.copytree(tiny["teacher"], other)
    changed = AutoTokenizer.from_pretrained(other)
    changed.add_tokens(["<extra>"])
    changed.save_pretrained(other)
    prompts = tmp_path / "set.jsonl"
    rows = [{"prompt": f"Write {i}.", "completion": "one two"} for i in range(12)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    done = evaluate(
        tiny["student"], "--config", str(tiny_config), "--prompts", str(prompts),
        "--out", str(out), f"teacher.model={other}",
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert "error: teacher.model: " in done.stderr
    assert "error: teacher: all figures that need the teacher were skipped." in done.stderr
    result = json.loads((out / "evaluation.json").read_text())
    assert result["figures"].keys() == {"student", "references"}
    tokens = len(tokenizer("one two", add_special_tokens=False).input_ids) + 1
    assert result["figures"]["references"]["length"]["mean"] == tokens < 10
    assert "warning: student completions are" in done.stdout
    assert "tokens longer than the references" in done.stdout
    assert {"ended", "distinct1", "rouge1"} <= result["figures"]["student"].keys()
    assert "reverse_kl_per_token" not in result["figures"]["student"]


def test_prompts_without_answers_are_evaluated(tiny, tiny_config, tmp_path):
    prompts, out = tmp_path / "set.jsonl", tmp_path / "out"
    prompts.write_text(json.dumps(ROWS[1]) + "\n")
    options = ["--config", str(tiny_config), "--prompts", str(prompts), "--out", str(out)]
    done = evaluate(tiny["student"], *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning: no prompt has a reference answer" in done.stderr
    figures = json.loads((out / "evaluation.json").read_text())["figures"]["student"]
    assert "reverse_kl_per_token" in figures and "rouge1" not in figures


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: is not a run directory (it has no config.yaml)."),
        (["x", "--config", "CONFIG"], "student.model: 'x' cannot be loaded"),
    ],
)
def test_models_that_cannot_be_evaluated(tiny_config, arguments, message):
    done = evaluate(*[str(tiny_config) if a == "CONFIG" else a for a in arguments])
    assert done.returncode == 2
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
