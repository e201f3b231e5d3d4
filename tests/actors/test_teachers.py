"""Both kinds of local teachers, compared with a plain transformers forward pass."""

from __future__ import annotations

import pytest
import torch
from ray.exceptions import RayActorError

from actors.groups import TeacherGroup
from actors.placement import ActorPlan
from actors.pool import Pool, is_alive, remote
from actors.teacher import TeacherActor
from seqkd.config.teacher import HfTeacherConfig, VllmTeacherConfig
from seqkd.errors import ActorError
from seqkd.models.loading import load_causal_lm
from seqkd.models.output_head import head_of
from seqkd.types import Rollout
from tests.actors.ray_calls import wait

KINDS = {"vllm": VllmTeacherConfig, "hf": HfTeacherConfig}


@pytest.fixture(scope="module")
def rollouts():
    torch.manual_seed(0)
    rollouts = []
    for i, (prompt, completion) in enumerate([(3, 5), (20, 1), (1, 12), (7, 7)]):
        ids = torch.randint(5, 260, (prompt + completion,)).tolist()
        rollouts.append(
            Rollout(
                str(i),
                f"{i}/0/0",
                tuple(ids[:prompt]),
                tuple(ids[prompt:]),
                None,
                "dataset",
                0,
                "length",
            )
        )
    return rollouts


@pytest.fixture(scope="module")
def start(local_ray, tiny):
    actors = []

    def start(kind, scores):
        options = {"kv_cache_gib": 0.1} if kind == "vllm" else {}
        config = KINDS[kind](model=tiny["teacher"], scores=scores, **options)
        plan = ActorPlan("teacher", 0, threads=1, gpus=0, share=1, bundle=0)
        environment = {"env_vars": plan.environment()}
        actor = remote(TeacherActor).options(runtime_env=environment).remote()
        actors.append(actor)
        wait(actor.start.remote(config, 64, 300))
        return Pool("teacher", [actor])

    yield start
    for actor in actors:
        local_ray.kill(actor)


@pytest.mark.parametrize("kind", KINDS)
def test_the_full_distribution(start, tiny, rollouts, kind):
    """Hidden states and head give the same log-probs as a plain forward pass at all positions."""
    scores = TeacherGroup(start(kind, "hidden")).score(rollouts)
    model = load_causal_lm(tiny["teacher"], "float32", "model")
    head = head_of(model)
    for r in rollouts:
        ids = torch.tensor([[*r.prompt_ids, *r.completion_ids]])
        with torch.no_grad():
            expected = torch.log_softmax(model(ids).logits[0], -1)[len(r.prompt_ids) - 1 : -1]
            actual = torch.log_softmax(head.finish(head.raw(scores[r.sample_id].hidden)), -1)
        assert (actual - expected).abs().max() <= 1e-4


def test_sampled_tokens_only(start, tiny, rollouts):
    model = load_causal_lm(tiny["teacher"], "float32", "model")
    scores = {kind: TeacherGroup(start(kind, "logprobs")).score(rollouts) for kind in KINDS}
    for r in rollouts:
        ids = torch.tensor([[*r.prompt_ids, *r.completion_ids]])
        with torch.no_grad():
            logprobs = torch.log_softmax(model(ids).logits[0, :, :300], -1)
        first = len(r.prompt_ids) - 1
        expected = torch.stack([logprobs[first + t, v] for t, v in enumerate(r.completion_ids)])
        for kind in KINDS:
            assert scores[kind][r.sample_id].hidden is None
            assert (scores[kind][r.sample_id].logprobs - expected).abs().max() <= 1e-4


def test_the_most_probable_tokens_and_the_rest(start, tiny, rollouts):
    model = load_causal_lm(tiny["teacher"], "float32", "model")
    scores = TeacherGroup(start("hf", "top_k")).score(rollouts)
    for r in rollouts:
        ids = torch.tensor([[*r.prompt_ids, *r.completion_ids]])
        with torch.no_grad():
            logprobs = torch.log_softmax(model(ids).logits[0, :, :300], -1)
        logprobs = logprobs[len(r.prompt_ids) - 1 : -1]
        score = scores[r.sample_id]
        assert torch.equal(score.top_ids.long(), logprobs.topk(64).indices)
        assert (score.top_logprobs[:, :64] - logprobs.topk(64).values).abs().max() <= 1e-4
        total = score.top_logprobs.exp().sum(-1)
        assert torch.allclose(total, torch.ones(len(logprobs)), atol=1e-5)
        drawn = logprobs.gather(-1, torch.tensor(r.completion_ids)[:, None]).squeeze(-1)
        assert (score.logprobs - drawn).abs().max() <= 1e-4


def test_a_failure_reports_its_first_cause(local_ray, rollouts):
    actor = remote(TeacherActor).remote()
    with pytest.raises(ActorError, match=r"teacher start failed: \w+: .*nowhere"):
        Pool("teacher", [actor]).each("start", HfTeacherConfig(model="/nowhere"), 64, 320)
    local_ray.kill(actor)
    with pytest.raises(RayActorError):  # the actor ends a moment later
        while True:
            local_ray.get(is_alive(actor))
    with pytest.raises(ActorError, match="teacher scoring died"):
        TeacherGroup(Pool("teacher", [actor])).score(rollouts)
