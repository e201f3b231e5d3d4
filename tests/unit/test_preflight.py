"""What must not start, and the warnings about what may."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml

from seqkd.config import load
from seqkd.errors import ConfigError
from seqkd.preflight import check


@pytest.fixture
def config(tiny, tmp_path):
    def rows(name, texts):
        (tmp_path / name).write_text("".join(json.dumps({"prompt": t}) + "\n" for t in texts))
        return str(tmp_path / name)

    data = {
        "name": "x",
        "student": {"model": tiny["student"]},
        "teacher": {"kind": "vllm", "model": tiny["teacher"]},
        "data": {
            "path": rows("train.jsonl", ["one", "two", "three"]),
            "heldout_path": rows("heldout.jsonl", ["four"]),
            "max_prompt_tokens": 64,
        },
        "evaluation": {"prompts": 1},
        "steps": 1,
    }
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(data))
    return lambda *overrides: load(file, overrides)


def changed(model, tmp_path, file, change):
    """A copy of a model directory with one JSON file changed."""
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    content = json.loads((copy / file).read_text())
    change(content)
    (copy / file).write_text(json.dumps(content))
    return str(copy)


def test_a_good_config_passes(config):
    checked = check(config())
    assert checked.warnings == ()
    assert (len(checked.train), len(checked.heldout)) == (3, 1)
    assert checked.stop_ids == (0,)


def test_a_checkpoint_without_a_language_model_head(config, tiny, tmp_path):
    def strip(content):
        content["architectures"] = ["LlamaModel"]

    model = changed(tiny["teacher"], tmp_path, "config.json", strip)
    with pytest.raises(ConfigError, match=r"teacher\.model: .*was saved as LlamaModel"):
        check(config(f"teacher.model={model}"))


def test_more_top_tokens_than_the_vocabulary_has(config):
    overrides = ["teacher.scores=top_k", "teacher.top_k=100000"]
    with pytest.raises(ConfigError, match=r"teacher\.top_k: 100000 is not below .* vocabulary of"):
        check(config(*overrides))


def test_layers_that_are_not_there(config):
    with pytest.raises(ConfigError, match=r"drop_layers: \[1, 9\) .* 2 layers"):
        check(config("student.init={kind: prune, drop_layers: [1, 9]}"))


@pytest.mark.parametrize("field", ["student.model", "teacher.model"])
def test_a_path_that_does_not_exist(config, field):
    with pytest.raises(ConfigError, match=f"{field}: '/nowhere/at/all' does not exist"):
        check(config(f"{field}=/nowhere/at/all"))


def test_everything_wrong_is_said_at_once(config, tmp_path):
    with pytest.raises(ConfigError) as caught:
        check(config("teacher.model=/nowhere", "rollout.max_tokens=1000", "data.path=/no.jsonl"))
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        "student.model",
        "teacher.model",
        "data.path",
    ]


def test_a_hub_name_that_cannot_be_reached(config):
    with pytest.raises(ConfigError, match=r"student.model: 'nobody/nothing' cannot be loaded"):
        check(config("student.model=nobody/nothing"))


def test_no_causal_language_model(config, tiny, tmp_path):
    vision = changed(tiny["student"], tmp_path, "config.json", lambda c: c.update(model_type="vit"))
    with pytest.raises(ConfigError, match=r"'vit', which is no causal language"):
        check(config(f"student.model={vision}"))


def test_different_tokenizers(config, tiny, tmp_path):
    def swap(content):
        vocab = content["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]

    other = changed(tiny["teacher"], tmp_path, "tokenizer.json", swap)
    with pytest.raises(
        ConfigError, match=r"2 tokens differ, such as 'a' \(student \d+, teacher \d+\)"
    ):
        check(config(f"teacher.model={other}"))


def test_an_endpoint_with_another_tokenizer_does_not_score(config, tiny, tmp_path):
    copy = changed(
        tiny["teacher"], tmp_path, "tokenizer_config.json", lambda c: c.update(eos_token="<|pad|>")
    )
    teacher = (
        "{kind: openai, model: m, base_url: 'http://127.0.0.1:9/v1', scores: top_k, tokenizer: "
    )
    with pytest.raises(ConfigError) as caught:
        check(config(f"teacher={teacher}{copy}}}"))
    (_, tokenizers) = str(caught.value).splitlines()
    assert tokenizers.startswith(f"teacher.tokenizer: the tokenizers of '{copy}' and of student")
    assert "set teacher.scores to none and sampler to teacher" in tokenizers


def test_another_end_of_sequence(config, tiny, tmp_path):
    other = changed(
        tiny["teacher"], tmp_path, "tokenizer_config.json", lambda c: c.update(eos_token="<|pad|>")
    )
    with pytest.raises(ConfigError, match=r"end-of-sequence is '<\|end\|>' for the student"):
        check(config(f"teacher.model={other}"))


def test_beyond_the_context(config):
    with pytest.raises(ConfigError, match="= 1064 is beyond its context of 512"):
        check(config("rollout.max_tokens=1000"))


def test_all_prompts_too_long(config):
    with pytest.raises(ConfigError, match="all 3 rows are longer"):
        check(config("data.max_prompt_tokens=3"))


def test_held_out_prompts_that_are_trained_on(config):
    same = config().data.path
    with pytest.raises(ConfigError, match=r"3 of 3 prompts are also in data\.path"):
        check(config(f"data.heldout_path={same}"))


def test_fewer_held_out_prompts_than_asked_for_is_a_warning(config):
    (warning,) = check(config("evaluation.prompts=5")).warnings
    assert "has 1 prompts, fewer than evaluation.prompts = 5" in warning


def test_padded_vocabularies_are_a_warning(config, tmp_path):
    from tiny_models import write_tiny

    padded = write_tiny(tmp_path / "padded", layers=2, seed=3, vocab_size=384)
    (warning,) = check(config(f"teacher.model={padded}")).warnings
    assert "320 output rows, teacher.model 384" in warning
