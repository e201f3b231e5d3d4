"""Errors that prevent a run from starting, and warnings that do not."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml

from seqkd.checks.preflight import check
from seqkd.checks.tokenizers import check_same_tokenizer
from seqkd.config.run import load
from seqkd.errors import ConfigError, ModelError


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
    """Copy a model directory with one JSON file changed."""
    copy = tmp_path / "copy"
    tmp_path.mkdir(exist_ok=True)
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
    assert [line.split(", ", 1)[1] for line in checked.sources] == [
        "format prompt (prompt): 3 conversations, 3 prompts",
        "format prompt (prompt): 1 conversations, 1 prompts",
    ]


def test_a_checkpoint_without_a_language_model_head(config, tiny, tmp_path):
    def strip(content):
        content["architectures"] = ["LlamaModel"]

    model = changed(tiny["teacher"], tmp_path, "config.json", strip)
    with pytest.raises(ConfigError, match=r"teacher\.model: .*was saved as LlamaModel"):
        check(config(f"teacher.model={model}"))


def test_more_top_tokens_than_the_vocabulary_has(config):
    overrides = ["teacher.scores=top_k", "teacher.top_k=100000"]
    with pytest.raises(ConfigError, match=r"teacher\.top_k: 100000 is not below the"):
        check(config(*overrides))


def test_layers_that_do_not_exist(config):
    with pytest.raises(ConfigError, match=r"drop_layers: \[1, 9\] .* 2 layers"):
        check(config("student.init={kind: prune, drop_layers: [1, 9]}"))


@pytest.mark.parametrize("field", ["student.model", "teacher.model"])
def test_a_path_that_does_not_exist(config, field):
    with pytest.raises(ConfigError, match=f"{field}: '/nowhere/at/all' does not exist"):
        check(config(f"{field}=/nowhere/at/all"))


def test_all_errors_are_reported_at_once(config, tmp_path):
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


def test_a_model_that_is_not_a_causal_language_model(config, tiny, tmp_path):
    vision = changed(tiny["student"], tmp_path, "config.json", lambda c: c.update(model_type="vit"))
    with pytest.raises(ConfigError, match=r"'vit', which is not a causal language"):
        check(config(f"student.model={vision}"))


def swapped(a, b):
    """Return a change that swaps the ids of two tokens."""

    def change(content):
        vocab = content["model"]["vocab"]
        vocab[a], vocab[b] = vocab[b], vocab[a]
        for token in content["added_tokens"]:
            token["id"] = vocab[token["content"]]

    return change


def refused(config, *overrides):
    with pytest.raises(ConfigError) as caught:
        check(config(*overrides))
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (
            swapped("a", "b"),
            "2 tokens of the vocabulary, such as 'a' (student id 69, teacher id 70)",
        ),
        (
            swapped("<|user|>", "<|assistant|>"),
            "2 tokens of the vocabulary, such as '<|assistant|>' (student id 4, teacher id 3)",
        ),
        (
            lambda c: c.update(normalizer={"type": "Lowercase"}),
            'normalizer (student null, teacher {"type": "Lowercase"})',
        ),
        (
            lambda c: c["pre_tokenizer"].update(use_regex=False),
            'pre-tokenizer (student {"type": "ByteLevel", "add_prefix_space": false, '
            '"trim_offsets": true, "use_regex": true}, teacher',
        ),
        (
            lambda c: c["added_tokens"][3].update(lstrip=True),
            'special and added tokens (entry 3: student {"id": 3, "content": "<|user|>"',
        ),
        (
            lambda c: c["model"].update(ignore_merges=True),
            'options of the model (student {"type": "BPE"',
        ),
    ],
)
def test_different_tokenizers(config, tiny, tmp_path, change, difference):
    other = changed(tiny["teacher"], tmp_path, "tokenizer.json", change)
    message = refused(config, f"teacher.model={other}").splitlines()[0]
    assert f"teacher.model: its tokenizer differs from that of student.model: {difference}" in (
        message
    )
    assert message.endswith("Choose models with the same tokenizer.")


def test_the_same_vocabulary_with_other_merges(config, tiny, tmp_path):
    """The tokenizers differ in which pair of "abc" they merge first. None of the probe texts would
    reveal this."""

    def merging(*merges):
        def change(content):
            content["model"]["vocab"] |= {"ab": 261, "bc": 262}
            content["model"]["merges"] = [list(m) for m in merges]

        return change

    student = changed(tiny["student"], tmp_path / "s", "tokenizer.json", merging("ab", "bc"))
    teacher = changed(tiny["teacher"], tmp_path / "t", "tokenizer.json", merging("bc", "ab"))
    assert (
        'differs from that of student.model: merges (entry 0: student ["a", "b"], teacher '
        '["b", "c"])'
    ) in refused(config, f"student.model={student}", f"teacher.model={teacher}")


def test_tokenizers_without_readable_rules_are_compared_on_probe_texts():
    from transformers import ByT5Tokenizer

    class Lower(ByT5Tokenizer):
        def _tokenize(self, text):
            return super()._tokenize(text.lower())

    check_same_tokenizer(ByT5Tokenizer(), ByT5Tokenizer(), "teacher.model", True)
    with pytest.raises(ModelError, match="they split 'The quick brown fox"):
        check_same_tokenizer(ByT5Tokenizer(), Lower(), "teacher.model", True)


def test_other_special_tokens_around_a_text_matter_to_plain_text_only(config, tiny, tmp_path):
    def begin(content):
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<|system|>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {
                "<|system|>": {"id": "<|system|>", "ids": [2], "tokens": ["<|system|>"]}
            },
        }

    other = changed(tiny["teacher"], tmp_path, "tokenizer.json", begin)
    assert check(config(f"teacher.model={other}")).warnings == ()
    message = refused(config, f"teacher.model={other}", "data.chat=false")
    assert "the text 'a' has ids [69] in the student, [2, 69] in the teacher" in message


@pytest.mark.parametrize(
    ("file", "key", "message"),
    [
        ("tokenizer.json", "normalizer", "teacher.tokenizer: its tokenizer differs from that of s"),
        ("tokenizer_config.json", "eos_token", "teacher.model: its end-of-sequence token is 1 '<|"),
    ],
)
def test_an_endpoint_with_another_tokenizer_does_not_score(
    config, tiny, tmp_path, file, key, message
):
    value = {"normalizer": {"type": "Lowercase"}, "eos_token": "<|pad|>"}[key]
    copy = changed(tiny["teacher"], tmp_path, file, lambda c: c.update({key: value}))
    teacher = (
        "{kind: openai, model: m, base_url: 'http://127.0.0.1:9/v1', scores: top_k, tokenizer: "
    )
    with pytest.raises(ConfigError) as caught:
        check(config(f"teacher={teacher}{copy}}}"))
    (_, tokenizers) = str(caught.value).splitlines()
    assert tokenizers.startswith(message)
    if key == "normalizer":
        assert "Set teacher.scores to none and sampler to teacher" in tokenizers


def test_another_end_of_sequence(config, tiny, tmp_path):
    other = changed(
        tiny["teacher"], tmp_path, "tokenizer_config.json", lambda c: c.update(eos_token="<|pad|>")
    )
    message = refused(config, f"teacher.model={other}")
    assert "teacher.model: its end-of-sequence token is 1 '<|pad|>', but completions" in message
    assert "Set eos_token_id in the student's generation_config.json to [0, 1]." in message


def test_a_stop_id_that_the_teacher_lacks_is_a_warning(config, tiny, tmp_path):
    def more(content):
        content["eos_token_id"] = [0, 3]

    other = changed(tiny["student"], tmp_path, "generation_config.json", more)
    (warning,) = check(config(f"student.model={other}")).warnings
    assert "student.model: completions also stop at 3 '<|user|>'" in warning


@pytest.mark.parametrize("model", ["student", "teacher"])
@pytest.mark.parametrize("eos", [300, 4000])
def test_a_stop_id_that_is_not_a_token(config, tiny, tmp_path, model, eos):
    other = changed(
        tiny[model], tmp_path, "generation_config.json", lambda c: c.update(eos_token_id=eos)
    )
    message = refused(config, f"{model}.model={other}")
    assert (
        f"{model}.model: end-of-sequence id {eos} is not a token of both the tokenizer" in message
    )
    assert "(261 tokens)" in message


def base(model, tmp_path):
    """Copy a model so that it ends with <|pad|> although its template ends a turn with <|end|>."""
    changed(model, tmp_path, "generation_config.json", lambda c: c.update(eos_token_id=1))
    file = tmp_path / "copy" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": "<|pad|>"}))
    return str(tmp_path / "copy")


def test_a_template_that_ends_an_answer_with_a_token_that_is_no_stop_id(config, tiny, tmp_path):
    """Teacher and student agree, but the completions of both would never end."""
    models = [f"{m}.model={base(tiny[m], tmp_path / m)}" for m in ("student", "teacher")]
    message = refused(config, *models)
    assert message.startswith(
        "student.model: its chat template ends an answer with 0 '<|end|>', but completions stop "
        "only at 1 '<|pad|>'"
    )
    assert message.endswith("generation_config.json to [1, 0].")
    assert check(config(*models, "data.chat=false")).warnings == ()


def templated(model, tmp_path, change):
    shutil.copytree(model, tmp_path / "templated")
    file = tmp_path / "templated" / "chat_template.jinja"
    file.write_text(change(file.read_text()))
    return str(tmp_path / "templated")


@pytest.mark.parametrize(
    ("change", "diff"),
    [
        (lambda t: t.replace("<|end|>", "<|end|>\n"), r"+<|system|>Answer in one short"),
        (lambda t: t.replace("m['content']", "m['content'].upper()"), "+<|system|>ANSWER IN ONE"),
        (lambda t: t + "{{ '<think>' if add_generation_prompt }}", "<|assistant|><think>"),
    ],
)
def test_another_template(config, tiny, tmp_path, change, diff):
    other = templated(tiny["teacher"], tmp_path, change)
    message = refused(config, f"teacher.model={other}")
    first, *rest = message.splitlines()
    assert first.startswith("teacher.model: its chat template differs from the student's")
    assert rest[:2] == ["    --- student", "    +++ teacher"]
    assert any(diff in line and line.startswith("    +") for line in rest)
    (warning,) = check(
        config(f"teacher.model={other}", "teacher.allow_template_mismatch=true")
    ).warnings
    assert warning.splitlines()[1:] == rest
    assert check(config(f"teacher.model={other}", "data.chat=false")).warnings == ()


def test_a_default_system_message_matters_only_without_a_system_message(config, tiny, tmp_path):
    default = "{% if messages[0]['role'] != 'system' %}<|system|>You are Q.<|end|>{% endif %}"
    other = templated(tiny["teacher"], tmp_path, lambda t: default + t)
    assert "+<|system|>You are Q." in refused(config, f"teacher.model={other}")
    checked = check(config(f"teacher.model={other}", "data.system=Be brief."))
    assert checked.warnings == ()


def test_a_teacher_without_a_template(config, tiny, tmp_path):
    shutil.copytree(tiny["teacher"], tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    message = refused(config, f"teacher.model={tmp_path / 'base'}")
    assert "its chat template differs" in message
    assert "+(no chat template, or a template error)" in message


def test_lengths_that_exceed_the_context(config):
    with pytest.raises(ConfigError, match="= 1064 exceeds the model's context of 512"):
        check(config("rollout.max_tokens=1000"))


def test_all_prompts_too_long(config):
    with pytest.raises(ConfigError, match="all 3 prompts are longer"):
        check(config("data.max_prompt_tokens=3"))


def test_held_out_prompts_that_are_trained_on(config):
    same = config().data.path
    with pytest.raises(ConfigError, match=r"3 of 3 prompts are also in data\.path"):
        check(config(f"data.heldout_path={same}"))


def test_fewer_held_out_prompts_than_asked_for_is_a_warning(config):
    (warning,) = check(config("evaluation.prompts=5")).warnings
    assert "has 1 prompts, fewer than evaluation.prompts = 5" in warning


def test_padded_vocabularies_are_a_warning(config, tmp_path):
    from scripts.tiny_models import write_tiny

    padded = write_tiny(tmp_path / "padded", layers=2, seed=3, vocab_size=384)
    (warning,) = check(config(f"teacher.model={padded}")).warnings
    assert "320 output rows and teacher.model 384" in warning
