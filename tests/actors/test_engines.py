"""Rollout engine compared with transformers on the same weights, before and after a sync."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from actors import weight_sync
from actors.placement import ActorPlan
from actors.pool import remote
from actors.rollout import RolloutActor
from seqkd.config.resources import EngineConfig
from seqkd.errors import SyncError
from seqkd.models.loading import load_causal_lm
from seqkd.types import Prompt
from tests.actors.ray_calls import completions, wait

PLAN = ActorPlan("rollout", 0, threads=1, gpus=0, share=1, bundle=0)


@contextmanager
def started(ray, tiny, **options):
    environment = {"env_vars": PLAN.environment()}
    actor = remote(RolloutActor).options(runtime_env=environment).remote((0,), "student")
    wait(actor.start.remote(tiny["student"], EngineConfig(kv_cache_gib=0.1, **options), 512))
    yield actor
    ray.kill(actor)


@pytest.fixture(scope="module")
def engine(local_ray, tiny):
    with started(local_ray, tiny) as actor:
        yield actor


@pytest.fixture(scope="module")
def compiled(local_ray, tiny):
    """Compiled engine, as on a GPU."""
    with started(local_ray, tiny, enforce_eager=False) as actor:
        yield actor


@pytest.fixture
def model(tiny):
    return load_causal_lm(tiny["student"], "float32", "model")


def drawn(model, rollout):
    """Return the log-probs of a rollout's tokens from a plain transformers forward pass."""
    ids = torch.tensor([[*rollout.prompt_ids, *rollout.completion_ids]])
    with torch.no_grad():
        logprobs = torch.log_softmax(model(ids).logits[0].double(), -1)
    start = len(rollout.prompt_ids) - 1
    return [logprobs[start + t, token].item() for t, token in enumerate(rollout.completion_ids)]


def sample(engine, prompts, seed=3, n=3, temperature=1.0, max_tokens=12):
    seeds = [seed + i for i in range(len(prompts))]
    numbers = [n] * len(prompts)
    return completions(engine.sample.remote(prompts, seeds, numbers, max_tokens, temperature, 1.0))


def sync(engine, model, version):
    with weight_sync.memory_file() as file:
        wait(engine.load.remote(publish(model, version, file), None))


def publish(model, version, file):
    state = {name: p.detach() for name, p in model.named_parameters()}
    return weight_sync.publish(state, version, file, "here")


def restore(engine, tiny, version):
    sync(engine, load_causal_lm(tiny["student"], "float32", "model"), version)


def test_logprobs_are_those_of_the_weights(engine, model, prompts):
    rollouts = sample(engine, prompts)
    assert len(rollouts) == len(prompts) * 3
    for r in rollouts:
        assert list(r.rollout_logprobs) == pytest.approx(drawn(model, r), abs=1e-3)


def test_completions_end_with_end_of_sequence_or_at_the_limit(engine, prompts):
    rollouts = sample(engine, prompts, n=24)
    assert {r.finish_reason for r in rollouts} == {"stop", "length"}
    for r in rollouts:
        assert 0 not in r.completion_ids[:-1]
        assert (r.completion_ids[-1] == 0) == (r.finish_reason == "stop") or len(
            r.completion_ids
        ) == 12


def test_the_same_seed_samples_the_same_completions(engine, prompts):
    assert sample(engine, prompts) == sample(engine, prompts)
    assert sample(engine, prompts) != sample(engine, prompts, seed=99)


def test_logprobs_are_those_of_the_sampling_distribution(engine, model, prompts):
    """With temperature 0.5 the distribution is softmax(2 x logits)."""
    (r, *_) = sample(engine, prompts[:1], n=1, temperature=0.5)
    ids = torch.tensor([[*r.prompt_ids, *r.completion_ids]])
    with torch.no_grad():
        logprobs = torch.log_softmax(2 * model(ids).logits[0].double(), -1)
    start = len(r.prompt_ids) - 1
    expected = [logprobs[start + t, token].item() for t, token in enumerate(r.completion_ids)]
    assert list(r.rollout_logprobs) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(("kind", "eager"), [("engine", True), ("compiled", False)])
def test_an_engine_is_compiled_if_configured(request, kind, eager):
    engine = request.getfixturevalue(kind)

    def is_eager(actor):
        return actor.llm.llm_engine.model_config.enforce_eager

    assert wait(engine.__ray_call__.remote(is_eager)) is eager


def test_an_engine_on_cpu_cores_does_not_compile_ahead_of_time(compiled):
    def ahead_of_time(actor):
        from vllm import envs

        return envs.VLLM_USE_AOT_COMPILE

    assert wait(compiled.__ray_call__.remote(ahead_of_time)) is False


@pytest.mark.parametrize("kind", ["engine", "compiled"])
def test_after_a_sync_the_engine_has_the_new_weights(request, kind, model, prompts, tiny):
    """All parameters are changed, including the tied output head, and no cached state is reused.
    The last prompt fills several cache blocks."""
    engine = request.getfixturevalue(kind)
    prompts = [*prompts, Prompt("long", tuple(5 + i % 250 for i in range(400)), "")]
    sample(engine, prompts)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    sync(engine, model, 1)
    rollouts = sample(engine, prompts)
    for r in rollouts:
        assert r.policy_version == 1
        assert list(r.rollout_logprobs) == pytest.approx(drawn(model, r), abs=1e-3)
    restore(engine, tiny, 2)


def test_unpublished_weights_do_not_change(engine, model, prompts, tiny):
    """With adapters, only some layers are published."""
    attention = {n: p for n, p in model.named_parameters() if ".self_attn." in n}
    with torch.no_grad():
        for p in attention.values():
            p.mul_(3)
    with weight_sync.memory_file() as file:
        version = weight_sync.publish(attention, 3, file, "here")
        assert version.digests.keys() == attention.keys()
        wait(engine.load.remote(version, None))
    for r in sample(engine, prompts):
        assert list(r.rollout_logprobs) == pytest.approx(drawn(model, r), abs=1e-3)
    restore(engine, tiny, 4)


@pytest.mark.parametrize("kind", ["engine", "compiled"])
def test_new_weights_overwrite_the_loaded_ones(request, kind, model, prompts, tiny):
    """The engine does not depend on the file after loading, and loads the next weights from it."""
    engine = request.getfixturevalue(kind)
    with weight_sync.memory_file() as file:
        first = publish(model, 7, file)
        wait(engine.load.remote(first, None))
        expected = sample(engine, prompts)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.5)
        second = publish(model, 8, file)
        assert second.path == first.path
        assert sample(engine, prompts) == expected
        wait(engine.load.remote(second, None))
        now = sample(engine, prompts)
    for r in now:
        assert list(r.rollout_logprobs) == pytest.approx(drawn(model, r), abs=1e-3)
    assert [r.rollout_logprobs for r in now] != [r.rollout_logprobs for r in expected]
    restore(engine, tiny, 9)


@pytest.mark.parametrize("fault", ["changed", "missing", "unknown"])
def test_weights_that_are_not_the_published_ones_are_refused(engine, model, tiny, fault):
    with weight_sync.memory_file() as file:
        version = publish(model, 3, file)
        name = "model.norm.weight"
        if fault == "changed":
            version.digests[name] = "0" * 32
        elif fault == "missing":
            version.digests["model.other.weight"] = "0" * 32
        else:
            del version.digests[name]
        with pytest.raises(SyncError, match="weight sync: model"):
            wait(engine.load.remote(version, None))
    restore(engine, tiny, 4)


def test_an_engine_on_another_node_gets_the_bytes(engine, model, prompts, tiny):
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    with weight_sync.memory_file() as file:
        version = publish(model, 5, file)
        data = weight_sync.read_bytes(version)
    assert not Path(version.path).exists()
    wait(engine.load.remote(version, data))
    (r, *_) = sample(engine, prompts)
    assert list(r.rollout_logprobs) == pytest.approx(drawn(model, r), abs=1e-3)
    restore(engine, tiny, 6)


def test_scoring_a_fixed_sequence(engine, model):
    ids = list(range(5, 40))
    with torch.no_grad():
        logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
    expected = [logprobs[t, ids[t + 1]].item() for t in range(len(ids) - 1)]
    assert wait(engine.logprobs.remote(ids)) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_published_file_is_read_unchanged(dtype):
    """safetensors reads tensors of any shape and memory layout, from a file that had other
    content."""
    base = torch.arange(12.0).view(3, 4).to(dtype)
    state = {"b": base.T, "a": base[1], "none": base[:0], "one": base[2, 3]}
    with weight_sync.memory_file() as file:
        weight_sync.publish({"before": torch.zeros(999)}, 0, file, "here")
        version = weight_sync.publish(state, 1, file, "here")
        loaded = load_file(version.path)
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        assert loaded[name].dtype == dtype and torch.equal(loaded[name], tensor), name
