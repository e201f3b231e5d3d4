"""A model evaluated by the real actors, on prompts with several answers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT

ROWS = [
    {"instruction": "Name a colour.", "instances": [{"input": "", "output": "red"}]},
    {"prompt": "Say yes."},
    {
        "instruction": "Name a bird.",
        "instances": [{"input": "a big one", "output": ["owl", "emu"]}],
    },
]


def evaluate(*arguments):
    command = [sys.executable, "-m", "seqkd", "evaluate", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)


def test_a_model_beside_its_teacher_and_without(tiny, tiny_config, tmp_path):
    prompts = tmp_path / "set.jsonl"
    rows = [ROWS[0], ROWS[2]]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--config", str(tiny_config), "--prompts", str(prompts), "--samples", "2"]
    out = tmp_path / "out"
    done = evaluate(tiny["student"], *options, "--out", str(out), "--bart", "/nowhere")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: --bart: '/nowhere'")
    found = json.loads((out / "evaluation.json").read_text())
    assert (found["prompts"], found["with_references"], found["samples_per_prompt"]) == (2, 2, 2)
    figures = found["figures"]
    assert figures.keys() == {"teacher", "student"}
    assert figures["student"]["reverse_kl_per_token"]["mean"] > 1
    assert figures["student"]["perplexity"]["mean"] > 100
    assert "reverse_kl_per_token" not in figures["teacher"]
    assert found["curves"]["student"].keys() == {"ends", "exposure_bias", "end_calibration"}
    states = found["curves"]["student"]["end_calibration"]["states"]
    rows = [json.loads(line) for line in (out / "generations.jsonl").read_text().splitlines()]
    assert [row["references"] for row in rows] == [["red"], ["owl", "emu"]]
    assert all(len(row["teacher"]) == len(row["student"]) == 2 for row in rows)
    assert 4 <= states <= 2 * 2 * 32
    assert not (out / "cache").exists()


def test_without_answers_or_with_another_tokenizer_the_rest_is_done(tiny, tiny_config, tmp_path):
    """The teacher cannot be compared with: the text is evaluated, and the reason is said."""
    from transformers import AutoTokenizer

    other = tmp_path / "other"
    shutil.copytree(tiny["teacher"], other)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(other)
    prompts = tmp_path / "set.jsonl"
    prompts.write_text(json.dumps(ROWS[1]) + "\n")
    out = tmp_path / "out"
    done = evaluate(
        tiny["student"], "--config", str(tiny_config), "--prompts", str(prompts),
        "--out", str(out), f"teacher.model={other}",
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert "error: teacher.model: " in done.stderr
    assert "error: teacher: all figures that need the teacher were skipped." in done.stderr
    assert "error: --prompts: no prompt has a reference answer" in done.stderr
    found = json.loads((out / "evaluation.json").read_text())
    assert found["figures"].keys() == {"student"}
    assert {"length", "ended", "distinct1"} <= found["figures"]["student"].keys()
    assert not {"rouge1", "reverse_kl_per_token"} & found["figures"]["student"].keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: is not a run directory (it has no config.yaml)."),
        (["x", "--config", "CONFIG"], "student.model: 'x' cannot be loaded"),
    ],
)
def test_what_cannot_be_evaluated(tiny_config, arguments, message):
    done = evaluate(*[str(tiny_config) if a == "CONFIG" else a for a in arguments])
    assert done.returncode == 2
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
