"""Learning rate schedule, running costs, intervals, placement, output heads and pruning."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from seqkd.config.learner import LearnerConfig
from seqkd.config.objectives import SequenceReverseKLConfig
from seqkd.config.phases import TermConfig
from seqkd.config.run import Config
from seqkd.config.student import PruneInitConfig
from seqkd.errors import ModelError, ResourceError
from seqkd.evaluation.intervals import ratio
from seqkd.learner.loss import stat_names
from seqkd.learner.running_costs import RunningCosts, by_position
from seqkd.learner.student import check_head, last_hidden
from seqkd.models.loading import load_causal_lm, without_dropout
from seqkd.models.output_head import head_of, load_head
from seqkd.models.pruning import prune
from seqkd.training.lr_schedule import learning_rate
from seqkd.types import EndStat
from tests.unit.config.test_config import MINIMAL


def config(**changes):
    return Config.model_validate({**MINIMAL, **changes})


def test_schedule_warms_up_and_decays():
    learner = LearnerConfig(lr_warmup_steps=2, min_lr_ratio=0.1, schedule="linear")
    rates = [learning_rate(learner, 3.0, step, 7) for step in range(7)]
    assert rates[:3] == pytest.approx([1, 2, 3])
    assert rates[-1] == pytest.approx(0.3)
    assert np.diff(rates[2:]) == pytest.approx([-0.675] * 4)
    constant = LearnerConfig(schedule="constant")
    assert {learning_rate(constant, 2.0, step, 5) for step in range(5)} == {2.0}
    cosine = LearnerConfig(schedule="cosine", min_lr_ratio=0.0)
    assert learning_rate(cosine, 1.0, 2, 5) == pytest.approx(0.5)
    assert learning_rate(LearnerConfig(lr_warmup_steps=9), 1.0, 0, 1) == 1.0


def test_running_costs_are_decayed_sums_over_past_batches():
    running = RunningCosts()
    running.update(*by_position([(0.0, [9.0])]))  # sequences with weight 0 are ignored
    assert not running.known
    running.update(*by_position([(1.0, [3.0, 1.0, 2.0])]))
    counts = running.counts([])
    assert (counts.rate, counts.length) == (2.0, 3.0)
    running.update(*by_position([(1.0, [2.0]), (0.5, [4.0])]))
    counts = running.counts([])
    assert counts.costs.tolist() == [1.5 + 4, 0.5, 1.0]
    assert counts.survival.tolist() == [0.5 + 1.5, 0.5, 0.5]
    assert counts.rate == pytest.approx(7 / 3)
    assert counts.length == pytest.approx(3 / 2)
    running.update(None, None)  # a step without a teacher changes nothing
    assert running.counts([]).rate == counts.rate


def test_a_graded_end_reads_the_statistics_of_all_end_tokens():
    graded = TermConfig(objective=SequenceReverseKLConfig(stop="graded"))
    batch = SimpleNamespace(teacher_hidden=True, teacher_logprobs=None, teacher_top_ids=None)
    names = stat_names(batch, (graded,), (3, 5))
    for name in ("content_logprob", "graded_kl"):
        assert EndStat(name, (3, 5)) in names
    plain = TermConfig(objective=SequenceReverseKLConfig())
    assert not [n for n in stat_names(batch, (plain,), (3, 5)) if isinstance(n, EndStat)]


def test_a_ratio_of_sums_is_inside_its_interval():
    numerator, denominator = np.array([1.0, 2, 9, 4]), np.array([1.0, 1, 3, 3])
    interval = ratio(numerator, denominator)
    assert interval.mean == pytest.approx(2.0)
    assert interval.low < 2.0 < interval.high
    exact = ratio(np.full(4, 3.0), np.full(4, 2.0))
    assert exact.low == exact.mean == exact.high == 1.5


def test_about_95_of_100_intervals_contain_the_true_value():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(100):
        interval = ratio(rng.exponential(2.0, 64), np.ones(64))
        hits += interval.low <= 2.0 <= interval.high
    assert 88 <= hits <= 99


def test_colocated_roles_share_cores_and_split_ones_do_not():
    from actors.placement import plan

    roles = {"rollout": {"cpus": 2}, "learner": {"ranks": 2}, "prompts_per_step": 4}
    together = plan(config(**roles))
    assert together.bundles == ({"CPU": 2.0},)
    assert sum(a.share for a in together.actors) <= 2.0
    assert [a.threads for a in together.actors] == [1, 1, 2, 1, 1]
    apart = plan(config(placement="split", **roles))
    assert [b["CPU"] for b in apart.bundles] == [1, 1, 2, 1, 1]
    assert [a.share for a in apart.actors] == [1, 1, 2, 1, 1]


def test_threads_come_from_the_request():
    from actors.placement import plan

    (actor,) = plan(config(rollout={"cpus": 3})).role("rollout")
    assert actor.environment()["OMP_NUM_THREADS"] == "3"


def test_processes_on_cores_reuse_freed_memory():
    """The pages of 4 MiB temporaries are requested from the kernel only once."""
    from actors.placement import plan

    (actor,) = plan(config()).role("learner")
    code = (
        "import numpy, resource\n"
        "for _ in range(50): several = [numpy.full(2**19, 1.0) for _ in range(4)]; del several\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)"
    )
    faults = [
        int(subprocess.run([sys.executable, "-c", code], env=env, capture_output=True).stdout)
        for env in ({**os.environ, **actor.environment()}, dict(os.environ))
    ]
    assert faults[0] < faults[1] / 5


def test_only_roles_that_are_used_get_actors():
    from actors.placement import plan

    none = {"evaluation": {"prompts": 0}}
    assert {a.role for a in plan(config(sampler="dataset", **none)).actors} == {"learner"}
    assert {a.role for a in plan(config(sampler="teacher", **none)).actors} == {
        "learner",
        "teacher_sampler",
    }
    assert {a.role for a in plan(config(**none)).actors} == {"learner", "rollout", "teacher"}
    assert len({a.role for a in plan(config(sampler="dataset")).actors}) == 4


def test_an_endpoint_has_one_actor_per_role():
    from actors.placement import plan

    endpoint = {"kind": "openai", "model": "m", "base_url": "http://x/v1", "tokenizer": "a"}
    scoring = config(teacher={**endpoint, "scores": "top_k"})
    (actor,) = plan(scoring).role("teacher")
    assert (actor.threads, actor.gpus) == (1, 0)
    assert len(plan(scoring).role("teacher_sampler")) == 1
    assert not plan(config(teacher=endpoint, sampler="teacher")).role("teacher")


def test_a_plan_that_does_not_fit_reports_keys_to_lower():
    from actors.placement import plan

    the_plan = plan(
        config(
            placement="split", rollout={"cpus": 16}, teacher={"kind": "hf", "model": "b", "gpus": 1}
        )
    )
    with pytest.raises(ResourceError) as caught:
        the_plan.check(cpus=8, gpus=4, where="the cluster")
    assert "needs 19 CPU cores, but the cluster has 8" in str(caught.value)
    assert "rollout.cpus or rollout.actors (now 16 in total)" in str(caught.value)
    assert "placement to colocated" in str(caught.value)
    with pytest.raises(
        ResourceError, match=r"needs 2 GPUs, but the cluster has 0\. Lower teacher\.gpus"
    ):
        the_plan.check(cpus=64, gpus=0, where="the cluster")
    the_plan.check(cpus=19, gpus=2, where="the cluster")


def test_a_head_loaded_from_a_checkpoint_equals_the_models(tiny):
    model = load_causal_lm(tiny["teacher"], "float32", "model")
    assert torch.equal(load_head(tiny["teacher"], "float32").weight, head_of(model).weight)
    check_head(model, "teacher.model")


def test_an_unknown_logit_transform_is_rejected(tiny):
    model = load_causal_lm(tiny["teacher"], "float32", "model")
    forward = model.forward

    def doubled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output

    model.forward = doubled
    with pytest.raises(ModelError, match="logits differ from the output head"):
        check_head(model, "student.model")


def test_a_checkpoint_with_missing_weights_is_rejected(tiny, tmp_path):
    model = load_causal_lm(tiny["student"], "float32", "model")
    state = model.state_dict()
    del state["model.layers.1.mlp.up_proj.weight"]
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ModelError, match=r"student\.model: .* model\.layers\.1\.mlp\.up_proj"):
        load_causal_lm(str(tmp_path), "float32", "student.model")


def test_without_dropout_training_mode_equals_evaluation_mode():
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    small = {"vocab_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = LlamaConfig(hidden_size=16, intermediate_size=16, attention_dropout=0.5, **small)
    ids = torch.arange(16)[None]
    for model in (LlamaForCausalLM(llama), GPT2LMHeadModel(GPT2Config(n_embd=16, **small))):
        expected = model.eval()(ids).logits
        assert not torch.allclose(model.train()(ids).logits, expected)
        without_dropout(model)
        assert torch.allclose(model.train()(ids).logits, expected)


def test_pruning_drops_the_configured_layers(tiny):
    model, whole = (load_causal_lm(tiny["teacher"], "float32", "model") for _ in range(2))
    prune(model, PruneInitConfig(drop_layers=(1, 3)))
    assert model.config.num_hidden_layers == 2
    kept = [whole.model.layers[0], whole.model.layers[3]]
    for layer, original in zip(model.model.layers, kept, strict=True):
        for a, b in zip(layer.parameters(), original.parameters(), strict=True):
            assert torch.equal(a, b)
    ids = torch.arange(9)[None]
    cached = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
    uncached = model.generate(
        ids, max_new_tokens=4, do_sample=False, eos_token_id=None, use_cache=False
    )
    assert torch.equal(cached, uncached)
    assert last_hidden(model, ids, torch.ones_like(ids)).shape == (1, 9, 64)


@pytest.mark.parametrize("layers", [(2, 5), (0, 4)])
def test_pruning_beyond_the_model_is_rejected(tiny, layers):
    with pytest.raises(ModelError, match="4 layers"):
        prune(
            load_causal_lm(tiny["teacher"], "float32", "model"), PruneInitConfig(drop_layers=layers)
        )
