"""The memory estimate, compared with arithmetic on an architecture and with small machines."""

from __future__ import annotations

import pytest

from seqkd.checks.memory import GIB, Need, check_memory, estimate, size_of
from seqkd.config.run import Config
from seqkd.config.student import PruneInitConfig, StudentConfig
from seqkd.errors import ResourceError
from seqkd.models.loading import load_causal_lm, load_config

ROLES = ("learner", "rollout", "teacher", "teacher_sampler")


@pytest.fixture
def smollm():
    """Config with the shape of SmolLM2-135M: 30 layers, hidden size 576, 49152 tokens, tied
    head."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )


def needs(model, **changes):
    data = {
        "name": "x",
        "student": {"model": "s"},
        "teacher": {"kind": "vllm", "model": "t", "kv_cache_gib": 0.25},
        "data": {"path": "x.jsonl"},
        "evaluation": {"prompts": 0},
        "steps": 1,
    }
    config = Config.model_validate(data | changes)
    return {need.role: need for need in estimate(config, model, {"": model}, ROLES)}


PARAMETERS = 49152 * 576 + 30 * (576 * (576 + 2 * 192 + 576) + 3 * 576 * 1536 + 2 * 576) + 576


def test_the_size_of_a_model(smollm, tiny):
    assert PARAMETERS == 134_515_008
    assert size_of(smollm).parameters == PARAMETERS
    assert size_of(smollm).head == 49152 * 576
    layer = 576 * (576 + 2 * 192 + 576) + 3 * 576 * 1536 + 2 * 576
    pruned = PruneInitConfig(drop_layers=(10, 18))
    assert (
        size_of(smollm, StudentConfig(model="s", init=pruned)).parameters == PARAMETERS - 8 * layer
    )
    assert smollm.num_hidden_layers == 30, "the config is not changed"
    model = load_causal_lm(tiny["teacher"], "float32", "model")
    size = size_of(load_config(tiny["teacher"], "model"))
    assert size.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("stage", "precision", "weights", "gradients", "optimizer"),
    [  # bytes per parameter on one of 4 ranks
        (0, "float32", 4, 4, 8),
        (0, "bfloat16", 2, 2, 16),
        (1, "bfloat16", 2, 2, 4),
        (2, "bfloat16", 2, 0.5, 4),
        (3, "bfloat16", 0.5, 0.5, 4),
        (3, "float32", 1, 1, 4),
    ],
)
def test_the_learner_by_zero_stage(smollm, stage, precision, weights, gradients, optimizer):
    learner = {"ranks": 4, "zero_stage": stage, "precision": precision}
    need = needs(smollm, learner=learner, prompts_per_step=4)["learner"]
    assert need.processes == 4
    for name, width in (
        ("weights", weights),
        ("gradients", gradients),
        ("optimizer", optimizer),
    ):
        assert need.parts[name] == pytest.approx(PARAMETERS * width / GIB), name
    assert need.parts["teachers' heads"] == pytest.approx(49152 * 576 * 4 / GIB)


def test_checkpointing_saves_activations(smollm):
    plain = needs(smollm)["learner"].parts["activations"]
    saving = needs(smollm, learner={"gradient_checkpointing": True})["learner"].parts["activations"]
    assert saving < plain / 8


def test_engines_and_scores_in_transit(smollm):
    roles = needs(smollm, rollout={"precision": "bfloat16", "actors": 2, "max_tokens": 100})
    assert roles["rollout"].parts["weights"] == pytest.approx(PARAMETERS * 2 / GIB)
    assert roles["rollout"].parts["KV cache"] == 1.0
    assert roles["rollout"].total == 2 * roles["rollout"].each
    assert roles["teacher"].parts["KV cache"] == 0.25
    # 4 prompts x 4 samples x 100 tokens x 576 numbers, three copies. Sampling ahead adds a fourth.
    once, in_transit = 4 * 4 * 100 * 576 * 4 / GIB, roles["driver"].parts["scores in transit"]
    assert in_transit == pytest.approx(3 * once)
    ahead = {"placement": "split", "rollout": {"max_tokens": 100, "max_off_policy_steps": 1}}
    assert needs(smollm, **ahead)["driver"].parts["scores in transit"] == pytest.approx(4 * once)
    scores = {"kind": "vllm", "model": "t", "scores": "top_k"}
    roles = needs(smollm, teacher=scores)
    assert roles["learner"].parts["teachers' heads"] == 0
    assert roles["teacher"].parts["scoring head"] == pytest.approx(49152 * 576 * 4 / GIB)


NEEDS = [Need("learner", 2, {"weights": 6.0}), Need("rollout", 1, {"weights": 3.0})]


def test_too_little_memory_is_an_error():
    with pytest.raises(ResourceError) as caught:
        check_memory(NEEDS, (14.0, 14.0), [])
    assert str(caught.value).startswith(
        "the run needs an estimated 15.0 GiB of memory, but this machine has 14.0 GiB. Most of it "
        "is for learner (12.0 GiB). Set learner.precision to bfloat16"
    )


def test_too_little_free_memory_is_a_warning():
    warning = check_memory(NEEDS, (16.0, 8.0), [])
    assert warning is not None
    assert "this machine has 16.0 GiB, of which 8.0 GiB are free now. Most of it is for" in warning
    assert check_memory(NEEDS, (16.0, 15.0), []) is None


def test_gpus():
    """Engines reserve their share of a GPU regardless of their need, and must fit into it."""
    engine = Need("rollout", 1, {"weights": 30.0}, gpus=0.5, utilization=0.5)
    learner = Need("learner", 1, {"weights": 35.0}, gpus=0.5)
    assert check_memory([engine, learner], (1.0, 1.0), [(80.0, 80.0)]) is None
    warning = check_memory([engine, learner], (1.0, 1.0), [(80.0, 70.0)])
    assert warning is not None
    assert "needs an estimated 75.0 GiB of GPU memory" in warning
    with pytest.raises(ResourceError, match=r"estimated 69\.0 GiB of GPU memory, .* has 68\.0"):
        check_memory([engine, learner], (1.0, 1.0), [(68.0, 68.0)])
    with pytest.raises(ResourceError, match=r"rollout: .* estimated 30\.0 GiB .* has 24\.0 GiB"):
        check_memory([engine], (1.0, 1.0), [(48.0, 48.0)])
