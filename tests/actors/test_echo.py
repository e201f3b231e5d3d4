"""Faults injected into real actors before the first step, and the messages that report them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from actors.groups import LearnerGroup, RolloutGroup, TeacherGroup
from actors.learner import LearnerRank
from actors.placement import ActorPlan
from actors.pool import Pool, remote
from actors.rollout import RolloutActor
from actors.teacher import TeacherActor
from seqkd.checks.preflight import check
from seqkd.checks.startup import check_workers
from seqkd.config.learner import LearnerConfig
from seqkd.config.resources import EngineConfig
from seqkd.errors import ActorError, ModelError
from seqkd.workers import Workers
from tests.actors.ray_calls import COMPLETION, PROMPT, small_config, wait

PLAN = ActorPlan("teacher", 0, threads=1, gpus=0, share=1, bundle=0)


class FaultyTeacher(TeacherActor):
    """Real teacher whose answers can be made faulty."""

    fault = ""

    def set_fault(self, fault):
        self.fault = fault

    def score(self, rollouts):
        if self.fault == "truncates":  # keeps only the end of a text that is too long
            return super().score([_last(r, PROMPT + COMPLETION - 4) for r in rollouts])
        self.states.model.train(self.fault == "dropout")
        for module in self.states.model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.1
        scores = super().score(rollouts)
        if self.fault == "drops the last token":
            return [replace(s, hidden=s.hidden[:-1]) for s in scores]
        if self.fault == "not a number":
            return [replace(s, hidden=s.hidden * torch.nan) for s in scores]
        if self.fault == "skips a rollout":
            return scores[1:]
        return scores


def _last(rollout, tokens):
    """Truncate the prompt from the left so that prompt and completion have at most ``tokens``."""
    cut = max(0, len(rollout.prompt_ids) + len(rollout.completion_ids) - tokens)
    return replace(rollout, prompt_ids=rollout.prompt_ids[cut:])


@pytest.fixture(scope="module")
def config(tiny, tmp_path_factory):
    def make(model=None, scores="hidden"):
        return small_config(tiny, tmp_path_factory.mktemp("data"), model, scores)

    return make


@pytest.fixture(scope="module")
def crew(local_ray, tiny):
    """One learner, one teacher that can be made faulty, and one engine with the student's
    weights."""
    environment = {"env_vars": PLAN.environment()}

    def create(cls, *args):
        return remote(cls).options(runtime_env=environment).remote(*args)

    learner = LearnerGroup(
        lambda: [create(LearnerRank, LearnerConfig(zero_stage=0))],
        (tiny["student"], {"": (tiny["teacher"], "float32")}),
        2,
        tiny["student"],
    )
    learner.ready()
    teacher = create(FaultyTeacher)
    engine = create(RolloutActor, (0,), "student")
    start = (tiny["student"], EngineConfig(kv_cache_gib=0.1), PROMPT + COMPLETION)
    wait(engine.start.remote(*start))
    yield learner, teacher, engine
    learner.kill()
    for actor in (teacher, engine):
        local_ray.kill(actor)


@pytest.fixture
def examine(crew, tiny):
    """Check the crew. ``serves`` is the model that scores, if it is not the configured one."""
    learner, teacher, engine = crew

    def examine(config, fault="", serves=None, roles=("teacher",)):
        serving = config.teacher.model_copy(update={"model": serves or config.teacher.model})
        wait(teacher.start.remote(serving, PROMPT + COMPLETION, 320))
        wait(teacher.set_fault.remote(fault))
        sampler = RolloutGroup(Pool("rollout", [engine]), COMPLETION, learner)
        workers = Workers(
            student=sampler,
            learner=learner,
            teachers={"": TeacherGroup(Pool("teacher", [teacher]))},
            teacher_samplers={"": sampler},
            teacher_of=config.teacher.choose,
            distribution=True,
        )
        return check_workers(config, check(config), workers, set(roles))

    return examine


def refused(examine, *args, **options):
    with pytest.raises(ModelError) as caught:
        examine(*args, **options)
    print(caught.value)
    return str(caught.value).splitlines()


@pytest.mark.parametrize("scores", ["hidden", "top_k", "logprobs"])
def test_a_good_teacher_passes(examine, config, scores):
    """The random teacher causes a warning, because its scores are worse than a uniform guess."""
    (warning,) = examine(config(scores=scores))
    assert "the mean log-prob of plain English is -8" in warning
    assert "worse than a uniform guess (-5.77)" in warning


def test_a_teacher_that_truncates_prompts(examine, config):
    (message,) = refused(examine, config(), "truncates")
    assert "scores do not depend on the first token of a prompt" in message
    assert f"data.max_prompt_tokens = {PROMPT}" in message


def test_a_teacher_that_is_not_deterministic(examine, config):
    (message,) = refused(examine, config(), "dropout")
    assert "repeated scores of the same text differ by" in message


@pytest.mark.parametrize("fault", ["drops the last token", "not a number"])
def test_tokens_without_scores(examine, config, fault):
    (message,) = refused(examine, config(), fault)
    assert "some tokens of the probe text have no log-prob, or a non-finite one" in message


def test_a_rollout_without_a_score(examine, config):
    with pytest.raises(ActorError, match="1 rollouts were returned without a score"):
        examine(config(), "skips a rollout")


def test_another_model_under_the_right_name(examine, config, tmp_path):
    """The weights of the scoring actor are not those of its checkpoint."""
    from scripts.tiny_models import write_tiny

    other = str(write_tiny(tmp_path / "other", layers=4, seed=9))
    (message,) = refused(examine, config(scores="logprobs"), serves=other)
    assert "from a forward pass of the checkpoint in transformers" in message
    assert "(limit 0.001 in float32)" in message


def test_an_untrained_output_head(examine, config, tiny, tmp_path):
    """All implementations agree on the scores, so only the scores themselves show the fault."""
    from seqkd.models.export import export
    from seqkd.models.loading import load_causal_lm

    torch.manual_seed(0)
    model = load_causal_lm(tiny["teacher"], "float32", "model")
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(0.02 * torch.randn_like(model.lm_head.weight))
    export(model, None, tmp_path / "new", tiny["teacher"])
    (message,) = refused(examine, config(str(tmp_path / "new"), "logprobs"))
    assert "as of an untrained model (-ln V = -5.77): its output head is untrained" in message


def test_engines_that_agree(examine, config, tiny):
    roles = ("rollout", "teacher", "teacher_sampler")
    examine(config(tiny["student"], "logprobs"), roles=roles)


def test_sampling_and_scoring_models_that_differ(examine, config):
    (message,) = refused(examine, config(), roles=("teacher", "teacher_sampler"))
    assert "from its sampling engine and from its scorer differ by" in message


def test_an_engine_without_the_students_weights(examine, config, crew, tiny):
    from actors import weight_sync
    from seqkd.models.loading import load_causal_lm

    learner, _, engine = crew
    published = learner.publish()
    model = load_causal_lm(tiny["student"], "float32", "model")
    with weight_sync.memory_file() as file:  # slightly different weights
        state = {n: p.detach() + 0.01 for n, p in model.named_parameters()}
        changed = weight_sync.publish(state, 0, file, published.node_id)
        wait(engine.load.remote(changed, None))
    (message,) = refused(examine, config(), roles=("rollout",))
    assert message.startswith("rollout: the log-probs of sampled tokens from the engine and from")
    wait(engine.load.remote(learner.publish(), None))
    assert examine(config(), roles=("rollout",)) == []
