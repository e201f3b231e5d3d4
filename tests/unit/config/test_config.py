"""Configuration errors contain the field, the value and the fix. Reading a configuration imports no
heavy package."""

from __future__ import annotations

import subprocess
import sys
from typing import get_args

import pytest
import yaml

from seqkd.comparison import plan
from seqkd.config.objectives import ObjectiveConfig, SequenceReverseKLConfig
from seqkd.config.resources import EngineConfig
from seqkd.config.run import Config, dump, load
from seqkd.config.samplers import SAMPLERS, SamplerName
from seqkd.errors import ConfigError
from seqkd.objectives import OBJECTIVES
from tests.conftest import ROOT

MINIMAL = {
    "name": "x",
    "student": {"model": "a"},
    "teacher": {"kind": "vllm", "model": "b"},
    "data": {"path": "train.jsonl", "heldout_path": "heldout.jsonl"},
    "steps": 3,
}


def test_objectives_and_samplers_are_complete_and_consistent():
    classes = get_args(get_args(ObjectiveConfig)[0])
    assert {c.model_fields["kind"].default for c in classes} == set(OBJECTIVES)
    assert all(c.label and c.samplers for c in classes)
    assert set(SAMPLERS) == set(get_args(SamplerName))
    for name, traits in SAMPLERS.items():
        (default,) = [c for c in classes if c.model_fields["kind"].default == traits.objective]
        assert traits.label and name in default.samplers


ENDPOINT = "teacher={kind: openai, model: m, base_url: 'http://x/v1'}"


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(MINIMAL))
    return file


def shipped():
    return sorted(p for p in (ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("file", shipped(), ids=lambda p: f"{p.parent.name}/{p.name}")
def test_every_shipped_config_parses(file):
    if file.parent.name == "comparisons":
        comparison = plan.load(file)
        runs = plan.entries(comparison, file)
        assert len(runs) == len(comparison.methods) * len(comparison.seeds) > 1
    else:
        assert isinstance(load(file), Config)


def test_dump_reads_back_equal(path, tmp_path):
    config = load(
        path,
        [
            "student.init={kind: prune, drop_layers: [1, 3]}",
            "warmup.steps=2",
            "warmup.sampler=teacher",
        ],
    )
    again = tmp_path / "again.yaml"
    again.write_text(dump(config))
    assert load(again) == config


@pytest.mark.parametrize(
    ("sampler", "objective"),
    [("student", "sequence_reverse_kl"), ("teacher", "sequence_forward_kl"), ("dataset", "sft")],
)
def test_the_sampler_sets_the_default_objective(path, sampler, objective):
    assert load(path, [f"sampler={sampler}"]).objective.kind == objective


def test_a_partial_objective_keeps_the_default_kind(path):
    objective = load(path, ["objective.estimator=single_step"]).objective
    assert isinstance(objective, SequenceReverseKLConfig)
    assert objective.estimator == "single_step"


def test_terms_that_share_a_sampler_share_its_completions(path):
    config = load(
        path,
        [
            "sampler=dataset",
            "weight=0.5",
            "extra_terms=[{sampler: dataset, weight: 0.5, objective: {kind: token_forward_kl}}, "
            "{sampler: student, unit: token}]",
        ],
    )
    assert list(config.by_sampler) == ["dataset", "student"]
    kinds = {name: [t.objective.kind for t in ts] for name, ts in config.by_sampler.items()}
    assert kinds == {"dataset": ["sft", "token_forward_kl"], "student": ["sequence_reverse_kl"]}


def test_the_generation_engine_inherits_the_scoring_engines_settings(path):
    teacher = load(path, ["teacher.cpus=3", "teacher.generation.kv_cache_gib=2"]).teacher
    assert (teacher.generation.cpus, teacher.generation.kv_cache_gib) == (3, 2)
    assert teacher.kv_cache_gib == 1


@pytest.mark.parametrize(
    "overrides",
    [
        ["teacher.scores=top_k"],
        ["teacher.scores=top_k", "sampler=mixture", "teacher.api=completions"],
        ["teacher.scores=logprobs", "objective={estimator: reinforce, normalization: total}"],
        ["teacher.scores=logprobs", "objective={estimator: reward_to_go, normalization: rate}"],
        ["teacher.tokenizer=null", "sampler=teacher"],
    ],
)
def test_endpoint_teachers_with_scores_are_accepted(path, overrides):
    config = load(path, [ENDPOINT, "teacher.tokenizer=a", *overrides])
    assert config.teacher.distribution == ("teacher.scores=top_k" in overrides)


def test_scientific_notation_is_a_number(path):
    assert load(path, ["learner.lr=1e-4"]).learner.lr == 1e-4


@pytest.mark.parametrize(
    ("overrides", "field", "fix"),
    [
        (["stpes=1"], "stpes", "Did you mean 'steps'"),
        (["rollout.max_token=3"], "rollout.max_token", "Did you mean 'max_tokens'"),
        (["teacher.kv_cache=1"], "teacher.kv_cache", "Did you mean 'kv_cache_gib'"),
        (["steps=0"], "steps: 0", "greater than or equal to 1"),
        (["steps=many"], "steps: 'many'", "valid integer"),
        (["learner.lr=.inf"], "learner.lr", "finite number"),
        (["learner.zero_stage=4"], "learner.zero_stage: 4", "0, 1, 2 or 3"),
        (["student.lora={}", "learner.compile=true"], "student.lora adapters", "compile to false"),
        (
            ["learner.zero_stage=3", "learner.compile=true"],
            "sharded weights of zero_stage 3",
            "compile to false",
        ),
        (["name=a/b"], "name: 'a/b'", "pattern"),
        (["teacher.kind=hf", "teacher.kv_cache_gib=null"], "teacher.kv_cache_gib", "unknown key"),
        (["teacher.kind=gpt"], "teacher.kind: 'gpt'", "'vllm', 'hf'"),
        (["objective.kind=ppo"], "objective.kind: 'ppo'", "'sequence_reverse_kl'"),
        (["student.init={kind: prune}"], "student.init.drop_layers", "Set it"),
        (["student.init={kind: prune, drop_layers: [4, 4]}"], "drop_layers", "below the last"),
        (
            ["sampler=teacher", "objective.kind=sequence_reverse_kl"],
            "'sequence_reverse_kl'",
            "Set sampler to student",
        ),
        (["rollout.samples_per_prompt=1"], "samples_per_prompt is 1", "at least 2"),
        (["rollout.temperature=0.7"], "temperature is 0.7", "Set both to 1"),
        (["rollout.top_p=0.9"], "top_p is 0.9", "Set both to 1"),
        (
            ["objective={estimator: reinforce, normalization: minillm}"],
            "'reinforce'",
            "single_step or rao_blackwell",
        ),
        (["teacher.scores=logprobs"], "teacher.scores is 'logprobs'", "to hidden"),
        (
            ["objective={kind: gjsd, beta: 1}"],
            "objective.beta: 1",
            "less than 1",
        ),
        (["objective={kind: skew_kl, skew: 0}"], "objective.skew: 0", "greater than 0"),
        (["objective.discount=1.5"], "objective.discount: 1.5", "less than or equal to 1"),
        (
            ["objective.importance_ratio_cap=0.5"],
            "objective.importance_ratio_cap: 0.5",
            "greater than or equal",
        ),
        (
            ["objective={clip_ratio: 0.2, importance_ratio_cap: 2}"],
            "clip_ratio is 0.2 and importance_ratio_cap is 2",
            "Remove one",
        ),
        (
            ["objective={estimator: reinforce, normalization: total, discount: 0.9}"],
            "estimator 'reinforce'",
            "discount to 1",
        ),
        (
            ["objective={normalization: minillm, baseline: position_mean}"],
            "baseline 'position_mean'",
            "leave_one_out",
        ),
        (
            ["objective={normalization: neutral, baseline: position_mean}"],
            "always 0 with normalization 'neutral'",
            "leave_one_out or none",
        ),
        (
            ["objective={estimator: reward_to_go, normalization: total, stop: graded}"],
            "stop is 'graded', but estimator 'reward_to_go'",
            "stop to future",
        ),
        (
            ["teacher.scores=top_k", "objective={stop: graded}"],
            "teacher's probability of the end",
            "teacher.scores to hidden",
        ),
        (
            ["sampler=mixture", "objective.clip_ratio=0.2"],
            "objective.clip_ratio",
            "Set sampler to student",
        ),
        (["sampler=teacher_cache"], "sampler 'teacher_cache' reads", "set teacher_cache.path"),
        (
            ["sampler=teacher_cache", "teacher_cache={path: j, records: dataset}"],
            "teacher_cache.records is 'dataset'",
            "Set objective.kind to sft",
        ),
        (["sampler=mixture", "updates_per_rollout=2"], "updates_per_rollout is 2", "Set it to 1"),
        (
            ["rollout.max_off_policy_steps=1"],
            "rollout.max_off_policy_steps is 1",
            "Set placement to split",
        ),
        (
            ["rollout.max_off_policy_steps=2", "placement=split"],
            "rollout.max_off_policy_steps",
            "equal to 1",
        ),
        (
            ["rollout.max_off_policy_steps=1", "placement=split", "sampler=mixture"],
            "rollout.max_off_policy_steps is 1",
            "Set rollout.max_off_policy_steps to 0",
        ),
        (
            [
                "teacher.scores=top_k",
                "objective={estimator: single_step, normalization: rate}",
            ],
            "objective.estimator",
            "rao_blackwell",
        ),
        (
            ["teacher={kind: openai, model: m, base_url: 'http://x/v1', api_key_env: sk-123}"],
            "teacher.api_key_env: is not the name",
            "name of the variable",
        ),
        ([ENDPOINT], "teacher.scores is 'none'", "Set it to top_k"),
        ([ENDPOINT, "objective.kind=sampled_token"], "teacher.scores is 'none'", "to logprobs"),
        (
            [ENDPOINT, "teacher.scores=top_k"],
            "teacher.tokenizer is not set",
            "the served model's tokenizer, or set scores to none",
        ),
        (
            [ENDPOINT, "sampler=teacher", "teacher.checkpoint=a"],
            "but scores is 'none'",
            "Set scores to logprobs",
        ),
        (
            [ENDPOINT, "teacher.tokenizer=a", "teacher.scores=logprobs"],
            "needs the teacher's distribution, but teacher.scores is 'logprobs'",
            "Set it to top_k",
        ),
        (
            [ENDPOINT, "sampler=mixture", "teacher.tokenizer=a", "teacher.scores=top_k"],
            "sampler 'mixture' needs the teacher's probability",
            "Set teacher.api to completions",
        ),
        (["rollout.teacher_fraction=1"], "rollout.teacher_fraction: 1", "less than 1"),
        (
            ["teacher.scores=top_k", "objective={kind: gjsd, temperature: 2}"],
            "objective.temperature is 2",
            "teacher.scores to hidden",
        ),
        (
            ["extra_terms=[{sampler: corpus, objective: {kind: sft}, unit: sequence}]"],
            "extra_terms.0.sampler 'corpus'",
            "data.corpus_path",
        ),
        (
            ["extra_terms=[{sampler: teacher, objective: {kind: sequence_reverse_kl}}]"],
            "extra_terms.0: objective 'sequence_reverse_kl'",
            "Set sampler to student",
        ),
        (
            ["extra_terms=[{sampler: teacher}, {sampler: dataset}]"],
            "extra_terms.1 (sft) is in nats per token, but the phase's own term "
            "(sequence_reverse_kl) is in nats per sequence",
            "Set extra_terms.1.unit to sequence, or unit to token",
        ),
        (
            ["extra_terms=[{sampler: teacher, weight: 0}]"],
            "extra_terms.0.weight: 0",
            "greater than 0",
        ),
        (["learner.ranks=5"], "prompts_per_step is 4", "Set it to 5 or more"),
        (["data.heldout_path=null"], "no prompts are held out", "evaluation.prompts to 0"),
        (["rollout.tensor_parallel_size=2"], "gpus is 0", "Set gpus to 2"),
        (["teacher.tensor_parallel_size=2"], " teacher: gpus is 0", "Set gpus to 2"),
        (["rollout.gpus=1.5"], "rollout.gpus: is 1.5", "whole number"),
        (["learner.betas=[0.9, 1.5]"], "learner.betas.1: 1.5", "less than 1"),
        (["steps"], "'steps'", "key=value"),
        (["name.deep=1"], "name is 'x', not a section", "Remove the override"),
        (["steps=[1"], "steps=[1", "not valid YAML"),
    ],
)
def test_invalid_input_raises_one_message_with_field_and_fix(path, overrides, field, fix):
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    message = str(caught.value)
    assert field in message
    assert fix in message
    assert len(message.splitlines()) == 1
    assert "BaseModel" not in message


@pytest.mark.parametrize(
    ("value", "gpus", "eager"),
    [(None, 0, True), (None, 0.5, False), (True, 1, True), (False, 0, False)],
)
def test_engines_on_gpus_are_compiled_by_default(value, gpus, eager):
    assert EngineConfig(enforce_eager=value, gpus=gpus).eager is eager


def test_all_problems_are_listed_at_once(path):
    with pytest.raises(ConfigError) as caught:
        load(path, ["steps=0", "learner.lr=-1"])
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("content", "problem"),
    [("[1, 2]", "mapping"), ("a: [", "not valid YAML"), ("", "mapping")],
)
def test_files_without_a_configuration_are_rejected(tmp_path, content, problem):
    file = tmp_path / "bad.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=problem):
        load(file)


def test_a_missing_file_is_reported(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load(tmp_path / "none.yaml")


def test_reading_a_config_imports_no_heavy_package():
    code = (
        "import sys, seqkd; import seqkd.cli.main; seqkd.load_config('configs/tiny.yaml'); "
        "print([m for m in ('torch', 'ray', 'vllm', 'deepspeed', 'transformers', 'numpy') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learner=1", "learner: 1 is not a section. Set its keys: learner.ranks=…"),
        ("objective=sft", "objective: 'sft' is not a section. Set its keys: objective.kind=…"),
        ("trackers=wandb", "trackers: 'wandb' is not a list. Write it in brackets: [a, b]."),
        ("sampler=stundent", "sampler: 'stundent': input should be 'student'"),
    ],
)
def test_a_wrong_type_is_reported_in_one_line(path, override, message):
    """An unknown sampler has no default objective, which is not reported as missing."""
    with pytest.raises(ConfigError) as caught:
        load(path, [override])
    assert f"{path}: {message}" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_unreadable_files_are_reported_with_the_fix(tmp_path):
    file = tmp_path / "a.yaml"
    for content, message in (
        (b"student:\n\tmodel: a\n", "line 2, column 1: found character .* Indent with spaces"),
        ("name: é".encode("latin1"), "is not UTF-8 text: .*saved as UTF-8"),
        (b"a: [1", "is not valid YAML: line 1, column 6: expected"),
    ):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            load(file)
    with pytest.raises(ConfigError, match=r"is a directory. Pass a YAML file"):
        load(tmp_path)
    file.rename(tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match=r"Pass .*/config.yaml, with --resume"):
        load(tmp_path)
