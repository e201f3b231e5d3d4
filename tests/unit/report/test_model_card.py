"""The exported student: loading with transformers, and the model card."""

from __future__ import annotations

import json
import re
import shutil
from importlib.metadata import version

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from seqkd.config.run import Config
from seqkd.evaluation.catalog import labeled
from seqkd.evaluation.heldout import Measurement
from seqkd.evaluation.summary import evaluation_json
from seqkd.models.export import export
from seqkd.models.loading import load_causal_lm
from seqkd.report import model_card
from tests.unit.config.test_config import MINIMAL

TEXT = "What is rain for?"


@pytest.fixture
def exported(tiny, tmp_path):
    """Function that exports the tiny student with a generation config, or without one if None."""

    def export_with(generation):
        source = tmp_path / "source"
        shutil.copytree(tiny["student"], source)
        (source / "generation_config.json").unlink()
        if generation is not None:
            (source / "generation_config.json").write_text(json.dumps(generation))
        model = load_causal_lm(str(source), "float32", "student.model")
        export(model, None, tmp_path / "student", str(source))
        return tmp_path / "student"

    return export_with


def greedy(directory, **options):
    """Return tokens generated with the model's generation config, without sampling."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    inputs = AutoTokenizer.from_pretrained(directory)(TEXT, return_tensors="pt")
    written = model.generate(**inputs, do_sample=False, max_new_tokens=12, **options)
    return written[0, inputs["input_ids"].shape[1] :].tolist()


def test_generation_ends_at_the_tokens_of_the_run(exported, tiny):
    """Generation ends at an id of generation_config.json and at the tokenizer's EOS token."""
    words = greedy(tiny["student"], eos_token_id=320)
    assert 0 not in words, "the tokenizer's EOS token"
    last = words[5]
    student = exported({"eos_token_id": [last], "pad_token_id": 1})
    assert GenerationConfig.from_pretrained(student).eos_token_id == [last, 0]
    assert greedy(student) == words[: words.index(last) + 1]


@pytest.mark.parametrize(
    ("generation", "kept"),
    [
        ({"do_sample": True, "temperature": 0.7, "top_k": 20, "pad_token_id": 7}, {}),
        # transformers refuses to save this config, but published models have it
        ({"temperature": 0.6, "top_p": 0.9}, {"pad_token_id": 1}),
        (None, {"pad_token_id": 1}),
    ],
)  # fmt: skip
def test_sampling_defaults_are_kept(exported, generation, kept):
    student = exported(generation)
    written = json.loads((student / "generation_config.json").read_text())
    written.pop("transformers_version")
    assert written == {"eos_token_id": [0], **(generation or {}), **kept}


def test_padding_defaults_to_the_end_token(tiny, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(tiny["student"], source)
    (source / "generation_config.json").write_text('{"eos_token_id": 5}')
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings["pad_token"] = None
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    model = load_causal_lm(str(source), "float32", "student.model")
    export(model, None, tmp_path / "student", str(source))
    assert GenerationConfig.from_pretrained(tmp_path / "student").pad_token_id == 5


# --- the card


def config(**changes):
    data = {
        **MINIMAL,
        "name": "mine",
        "teacher": {"kind": "vllm", "model": "Qwen/Qwen2.5-7B-Instruct"},
        "data": {"path": "HuggingFaceH4/ultrachat_200k", "split": "train_sft",
                 "heldout_split": "test_sft", "rows": 500},
        "warmup": {"sampler": "teacher", "steps": 3, "prompts_per_step": 8},
        "sampler": "student",
        "objective": {"kind": "sequence_reverse_kl", "normalization": "rate"},
        "extra_terms": [{"sampler": "dataset", "weight": 0.5}],
        "steps": 2,
        "learner": {"lr": 2e-6},
    }  # fmt: skip
    return Config.model_validate(data | changes)


def measurement(seed):
    """Return random sums of 6 prompts."""
    generator = np.random.default_rng(seed)
    names = ("reverse_kl", "forward_kl", "nll", "student_tokens", "teacher_tokens")
    sums = {name: generator.uniform(1, 9, 6) for name in names}
    ended = {"sequences": np.ones(6), "student_ended": np.eye(6)[0], "teacher_ended": np.ones(6)}
    return Measurement(sums | ended, (), ())


@pytest.fixture
def run(tmp_path):
    """Directory of a finished run: metrics of two phases and a student."""
    (tmp_path / "student").mkdir()
    rows = [
        {"step": 0, "sampler": "teacher", "tokens": 100, "teacher_prompt_tokens": 7},
        {"step": 1, "sampler": "student", "tokens": 1000, "dataset/tokens": 10},
        {"step": 2, "sampler": "student", "tokens": 500, "dataset/tokens": 20},
        {"step": 3, "sampler": "student", "tokens": 9999, "skipped": True},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def written(run, config, evaluation=None):
    model_card.write(run, config, evaluation)
    return ModelCard.load(run / "student" / "README.md")


def test_front_matter_is_readable_by_the_hub(run):
    metadata = written(run, config(student={"model": "Qwen/Qwen2.5-1.5B-Instruct"})).data.to_dict()
    assert metadata == {
        "base_model": "Qwen/Qwen2.5-1.5B-Instruct",
        "base_model_relation": "finetune",
        "datasets": ["HuggingFaceH4/ultrachat_200k"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["distillation", "seqkd"],
    }


def test_local_paths_are_not_hub_names(run, tiny, tmp_path):
    (tmp_path / "rows.jsonl").write_text("")
    local = config(
        student={"model": tiny["student"], "init": {"kind": "prune", "drop_layers": [0, 1]}},
        data={"path": str(tmp_path / "rows.jsonl"), "heldout_path": "other.jsonl"},
    )
    card = written(run, local)
    metadata = card.data.to_dict()
    assert metadata.keys() == {"library_name", "pipeline_tag", "tags"}
    assert metadata["tags"] == ["distillation", "pruned", "seqkd"]
    assert "`student` (a local directory) without decoder layers [0, 1)" in card.text


@pytest.mark.parametrize(
    ("original", "expected"),
    [
        ("---\nlicense: apache-2.0\n---\n# x\n", {"license": "apache-2.0"}),
        (
            "---\nlicense: other\nlicense_name: qwen\nlicense_link: LICENSE\ntags: [a]\n---\n",
            {"license": "other", "license_name": "qwen", "license_link": "LICENSE"},
        ),
        ("---\ntags: [a]\n---\n", {}),
        ("no front matter", {}),
        ("---\nlicense: [\n---\n", {}),
        (None, {}),
    ],
)
def test_license_is_from_the_original_card(run, tiny, tmp_path, original, expected):
    source = tmp_path / "source"
    shutil.copytree(tiny["student"], source)
    if original is not None:
        (source / "README.md").write_text(original)
    card = written(run, config(student={"model": str(source)}))
    metadata = card.data.to_dict()
    assert {k: v for k, v in metadata.items() if k.startswith("license")} == expected
    assert ("not specified" in card.text) == (not expected)


def test_table_has_the_figures_of_the_evaluation(run, tokenizer):
    stages = {"initial": measurement(0), "warmup": measurement(1), "main": measurement(2)}
    evaluation = evaluation_json(stages, ["prompt"] * 6, tokenizer, 0)
    card = written(run, config(), json.loads(json.dumps(evaluation)))
    lines = [line.split(" | ") for line in card.text.splitlines() if line.startswith("| ")]
    heads, rows = lines[0], {line[0].removeprefix("| "): line[1:] for line in lines[1:]}
    assert [head.strip("| ") for head in heads] == ["", "before", "after warmup", "after main"]
    assert rows.keys() == {labeled(figure) for figure in evaluation["figures"]["main"]}
    for stage, column in (("initial", 0), ("warmup", 1), ("main", 2)):
        for figure, interval in evaluation["figures"][stage].items():
            numbers = re.findall(r"[\d.]+", rows[labeled(figure)][column])
            assert [float(n) for n in numbers] == pytest.approx(
                [interval["mean"], interval["low"], interval["high"]], rel=5e-3
            )
    assert "On 6 held-out prompts" in card.text


def test_card_has_the_warning_about_length(run, tokenizer):
    stages = {"initial": measurement(0), "main": measurement(2)}
    evaluation = json.loads(json.dumps(evaluation_json(stages, ["prompt"] * 6, tokenizer, 0)))
    assert "Warning" not in written(run, config(), evaluation).text
    text = written(run, config(), evaluation | {"warnings": {"main": "student completions"}}).text
    assert text.index("**Warning:** student completions.\n\n| |") < text.index("reverse KL")


def test_card_describes_the_training(run):
    text = written(run, config()).text
    for words in (
        f"seqkd {version('seqkd')}",
        "[`Qwen/Qwen2.5-7B-Instruct`](https://huggingface.co/Qwen/Qwen2.5-7B-Instruct)",
        "warmup: 3 steps of `sequence_forward_kl` on the teacher's samples; 8 prompts per step",
        "main: 2 steps of `sequence_reverse_kl` (estimator rao_blackwell, baseline leave_one_out, "
        "normalization rate, future_weight 1.0, discount 1.0, stop future) on the student's "
        "samples + 0.5 `sft` on the data set's answers; 4 prompts per step, 4 samples per prompt, "
        "learning rate 2e-06",
        "100 of the teacher's samples; 1,500 of the student's samples; "
        "30 of the data set's answers",
        "split `train_sft`, at most 500 rows",
        "Not evaluated.",
    ):
        assert words in text, words


def test_configuration_in_the_card_omits_execution_keys(run):
    teacher = {"kind": "openai", "model": "big", "base_url": "https://inner.example/v1"}
    card = written(run, config(teacher=teacher, sampler="teacher", objective=None, extra_terms=[]))
    block = re.search(r"```yaml\n(.*?)```", card.text, re.DOTALL)
    options = yaml.safe_load(block[1])
    assert options["learner"]["lr"] == 2e-6 and options["warmup"]["steps"] == 3
    assert options["objective"] == {"kind": "sequence_forward_kl"}
    assert "inner.example" not in card.text and "runs_dir" not in options


def test_example_in_the_card_runs(run, tiny, monkeypatch, capsys):
    """The Python example runs in the directory of the card."""
    shutil.copytree(tiny["student"], run / "student", dirs_exist_ok=True)
    text = written(run, config(rollout={"max_tokens": 5})).text
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    monkeypatch.chdir(run / "student")
    torch.manual_seed(0)
    names = {}
    exec(code, names)
    assert names["output"].shape[1] <= names["inputs"]["input_ids"].shape[1] + 5
    assert capsys.readouterr().out.strip()


def test_moved_student_directory_has_no_license(tmp_path):
    assert model_card.license_of(str(tmp_path / "moved")) == {}
