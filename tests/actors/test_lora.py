"""DeepSpeed ranks that train adapters: comparison with plain torch, state, sync and export."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, load_file, save_file
from torch import nn

from actors.groups import LearnerGroup
from actors.learner import LearnerRank
from actors.placement import ActorPlan
from actors.pool import remote
from actors.rollout import RolloutActor
from seqkd.config.learner import LearnerConfig
from seqkd.config.resources import EngineConfig
from seqkd.config.student import LoraConfig
from seqkd.errors import ModelError
from seqkd.models.loading import load_causal_lm
from seqkd.models.lora import Adapters
from seqkd.protocols import Part
from seqkd.types import Counts
from tests.actors.ray_calls import completions, wait
from tests.actors.test_learner import LR, STEPS, TERMS, scored

LORA = LoraConfig(rank=4, alpha=12, targets=("q_proj", "v_proj", "down_proj"))
SEED = 5
PLAN = ActorPlan("learner", 0, threads=1, gpus=0, share=1, bundle=0)
OPTIONS: dict[int, dict[str, Any]] = {
    1: {"ranks": 1, "zero_stage": 0, "micro_batch_tokens": 10**6},
    2: {"ranks": 2, "zero_stage": 3, "micro_batch_tokens": 1, "gradient_checkpointing": True},
}
IDS = torch.arange(5, 45)[None]


class OpenRank(LearnerRank):
    """One that shows the weights it computes with."""

    def weights(self):
        return self._gathered()


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """With weights of more than the 100,000 elements that DeepSpeed's ZeRO 3 leaves whole."""
    from scripts.tiny_models import write_tiny

    folder = tmp_path_factory.mktemp("wide")
    return {
        "teacher": str(write_tiny(folder / "teacher", layers=4, seed=1, vocab_size=2048)),
        "student": str(write_tiny(folder / "student", layers=2, seed=2, vocab_size=2048)),
    }


@pytest.fixture(scope="module")
def counts():
    return Counts(sequences=8, tokens=50, rate=1.5, length=5.0)


@pytest.fixture(scope="module")
def start(local_ray):
    """Function that starts a learner. All learners are killed after the tests of this module."""
    started: list = []

    def start(models, lora=LORA, seed=SEED, **options):
        config = LearnerConfig(lr=LR, max_grad_norm=1.0, **options)
        cls = remote(OpenRank).options(runtime_env={"env_vars": PLAN.environment()})
        group = LearnerGroup(
            lambda: [cls.remote(config, lora, seed) for _ in range(config.ranks)],
            (models["student"], {"": (models["teacher"], "float32")}),
            config.micro_batch_tokens,
            models["student"],
        )
        started.append(group)
        group.ready()
        return group

    yield start
    for group in started:
        group.kill()


@pytest.fixture(scope="module")
def one(start, tiny, tmp_path_factory):
    """One rank of ZeRO 0, and the directory of its initial state."""
    return saved_at_first(start(tiny, **OPTIONS[1]), tmp_path_factory)


@pytest.fixture(scope="module")
def two(start, wide, tmp_path_factory):
    """Two ranks of ZeRO 3, and the directory of their initial state."""
    return saved_at_first(start(wide, **OPTIONS[2]), tmp_path_factory)


def saved_at_first(learner, tmp_path_factory):
    directory = tmp_path_factory.mktemp("first")
    learner.save(str(directory))
    return learner, directory


@pytest.fixture(params=["one", "two"])
def begun(request, tiny, wide):
    """Learner in its initial state, and its models."""
    learner, directory = request.getfixturevalue(request.param)
    learner.restore(str(directory), 0)
    return learner, {"one": tiny, "two": wide}[request.param]


def steps(learner, models, counts, number=STEPS):
    part = Part(*scored(models), counts, TERMS)
    return [learner.step([part], LR) for _ in range(number)]


def weights(learner):
    """Return all parameters by name, gathered by the first rank."""
    first, *_ = [wait(ref) for ref in [rank.weights.remote() for rank in learner.ranks]]
    return first


def published(learner):
    """Return a copy of the published weights, because the next weights overwrite them."""
    return load(Path(learner.publish().path).read_bytes())


def same(state, expected):
    assert state.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(state[name], weight), name


# --- the definition


class Low(nn.Module):
    """h = W x + (alpha / rank) B (A x)."""

    def __init__(self, layer, a):
        super().__init__()
        self.layer = layer
        self.a, self.b = nn.Parameter(a.clone()), nn.Parameter(torch.zeros(len(layer.weight), 4))

    def forward(self, x):
        return self.layer(x) + 12 / 4 * (x @ self.a.T) @ self.b.T


def defined(models, first):
    """Return the student with adapters on its q, v and down matrices. A is taken from the weights
    ``first``."""
    model = load_causal_lm(models["student"], "float32", "model")
    model.requires_grad_(False)
    low = {}
    for i, layer in enumerate(model.model.layers):
        for block, name in (("self_attn", "q"), ("self_attn", "v"), ("mlp", "down")):
            where = f"model.layers.{i}.{block}.{name}_proj"
            parent = getattr(layer, block)
            a = first[f"{where}.lora_A.default.weight"]
            low[where] = Low(getattr(parent, f"{name}_proj"), a)
            setattr(parent, f"{name}_proj", low[where])
    return model, low


def formula(models, first, counts):
    """Take the steps in plain torch. Returns gradient norms, and layers with the final A and B."""
    rollouts, _ = scored(models)
    teacher = load_causal_lm(models["teacher"], "float32", "model")
    model, low = defined(models, first)
    learning = [p for layer in low.values() for p in (layer.a, layer.b)]
    optimizer = torch.optim.AdamW(learning, lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    norms = []
    for _ in range(STEPS):
        kls, logprobs = {}, {}
        for r in rollouts:
            ids = torch.tensor([[*r.prompt_ids, *r.completion_ids]])
            span = slice(len(r.prompt_ids) - 1, -1)
            log_q = torch.log_softmax(model(ids).logits[0, span], -1)
            with torch.no_grad():
                log_p = torch.log_softmax(teacher(ids).logits[0, span], -1)
            kls[r.sample_id] = (log_q.exp() * (log_q - log_p)).sum(-1)
            logprobs[r.sample_id] = log_q[torch.arange(len(log_q)), list(r.completion_ids)]
        loss = torch.zeros(())
        for r in rollouts:
            (other,) = [o for o in rollouts if o.prompt_id == r.prompt_id and o is not r]
            own = kls[r.sample_id]
            for t in range(len(own)):
                future = sum(k.item() - counts.rate for k in own[t + 1 :])
                baseline = sum(k.item() - counts.rate for k in kls[other.sample_id][t + 1 :])
                loss = loss + own[t] + (future - baseline) * logprobs[r.sample_id][t]
        loss = loss / (len(rollouts) * counts.length)
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(learning, 1.0).item())
        optimizer.step()
    return norms, low


def test_the_update_follows_the_definition_and_the_base_does_not_change(begun, counts):
    learner, models = begun
    first = weights(learner)
    results = steps(learner, models, counts)
    norms, low = formula(models, first, counts)
    assert [r.grad_norm for r in results] == pytest.approx(norms, rel=1e-4)
    now = weights(learner)
    for where, layer in low.items():
        for kind, expected in (("A", layer.a), ("B", layer.b)):
            # As in tests/actors/test_learner.py, rounding matters where a gradient is almost 0, by
            # an amount that depends on the processor. The limit is a twentieth of a step (LR).
            difference = (now[f"{where}.lora_{kind}.default.weight"] - expected).abs()
            assert difference.max() <= LR / 20, (where, kind)
            # At most one element in a thousand, but at least one (A has 256 elements).
            assert (difference > 1e-5).sum() <= max(1, 1e-3 * len(difference.flatten())), (
                where,
                kind,
            )
        assert (layer.b.abs() > LR / 2).any(), "training has changed B"
    base = load_causal_lm(models["student"], "float32", "model")
    kept = {n.replace(".base_layer", ""): w for n, w in now.items() if ".lora_" not in n}
    same(kept, {name: p.detach() for name, p in base.named_parameters()})
    merged = published(learner)
    for where, layer in low.items():
        product = layer.b.double() @ layer.a.double()
        expected = kept[f"{where}.weight"].double() + 12 / 4 * product
        assert (merged.pop(f"{where}.weight") - expected).abs().max() <= 5e-5, where
    same(merged, {name: kept[name] for name in merged})


def test_the_initial_published_weights_are_those_of_the_model(begun):
    """Only attention and MLP have adapters, so embedding and norms are not published."""
    learner, models = begun
    base = load_causal_lm(models["student"], "float32", "model")
    layers = {
        n: p.detach() for n, p in base.named_parameters() if ".self_attn." in n or ".mlp." in n
    }
    assert len(layers) == 2 * 7
    same(published(learner), layers)


def test_the_seed_determines_the_initial_adapters(begun, tiny):
    """All ranks and all starts have the same initial adapters as a model without DeepSpeed."""
    learner, models = begun
    begins = weights(learner)
    model = load_causal_lm(models["student"], "float32", "model")
    Adapters(model, LORA, SEED)
    for name, p in model.named_parameters():
        assert torch.equal(begins[name], p), name


# --- state


def test_a_state_contains_only_adapters_and_leads_to_the_same_next_step(
    begun, start, counts, tmp_path
):
    """The state is restored in the same processes, and in new processes with other initial
    adapters."""
    learner, models = begun
    steps(learner, models, counts)
    learner.save(str(tmp_path))
    tensors = {}
    for file in tmp_path.iterdir():
        tensors |= load_file(file)
        with safe_open(file, framework="pt") as reader:
            assert reader.metadata()["student.lora.rank"] == "4"
    adapters = {n for n in weights(learner) if ".lora_" in n}
    assert len(adapters) == 2 * 3 * 2
    assert tensors.keys() == {
        f"{key}/{name}" for key in ("master", "exp_avg", "exp_avg_sq") for name in adapters
    }
    (after,) = steps(learner, models, counts, 1)
    expected = published(learner)
    options = OPTIONS[len(learner.ranks)]
    for other in (learner, start(models, seed=SEED + 1, **options)):
        other.restore(str(tmp_path), STEPS)
        (again,) = steps(other, models, counts, 1)
        assert (again.loss, again.grad_norm) == (after.loss, after.grad_norm)
        same(published(other), expected)
        assert other.policy_version == STEPS + 1
    other.kill()


@pytest.fixture(scope="module")
def low(start, tiny):
    """Learner with the same adapters in bfloat16 and with another stage."""
    return start(tiny, ranks=2, zero_stage=2, precision="bfloat16", micro_batch_tokens=50)


def test_another_precision_and_stage_restore_the_same(one, low, tiny, counts, tmp_path):
    learner, first = one
    learner.restore(str(first), 0)
    steps(learner, tiny, counts)
    learner.save(str(tmp_path))
    expected = weights(learner)
    low.restore(str(tmp_path), STEPS)
    restored = weights(low)
    same(restored, {name: weight.bfloat16() for name, weight in expected.items()})
    (tmp_path / "again").mkdir()
    low.save(str(tmp_path / "again"))
    masters = {}
    for file in (tmp_path / "again").iterdir():
        masters |= load_file(file)
    (file,) = tmp_path.glob("*.safetensors")
    same(masters, load_file(file))


def test_bfloat16_trains_and_publishes_weights_merged_in_float32(low, tiny, counts):
    before = weights(low)
    results = steps(low, tiny, counts)
    assert all(math.isfinite(r.loss) and r.grad_norm > 0 and not r.skipped for r in results)
    now, merged = weights(low), published(low)
    where = "model.layers.0.mlp.down_proj"
    a, b = (now[f"{where}.lora_{kind}.default.weight"] for kind in "AB")
    assert not torch.equal(before[f"{where}.lora_B.default.weight"], b)
    base = now[f"{where}.base_layer.weight"]
    expected = base.double() + 3 * b.double() @ a.double()
    assert merged[f"{where}.weight"].dtype == torch.bfloat16
    assert torch.allclose(merged[f"{where}.weight"].double(), expected, rtol=2**-8, atol=1e-6)
    assert torch.equal(base, before[f"{where}.base_layer.weight"])


@pytest.mark.parametrize(
    ("field", "then", "now"),
    [
        ("rank", "8", "4"),
        ("alpha", "4", "12"),
        ("targets", "q_proj", "down_proj, q_proj, v_proj"),
    ],
)
def test_the_state_of_other_adapters_is_refused(one, tiny, tmp_path, field, then, now):
    learner, directory = one
    learner.restore(str(directory), 0)
    before = published(learner)
    (file,) = directory.iterdir()
    with safe_open(file, framework="pt") as reader:
        saved = reader.metadata()
    changed = tmp_path / file.name
    save_file(load_file(file), changed, saved | {f"student.lora.{field}": then})
    with pytest.raises(ModelError) as caught:
        learner.restore(str(tmp_path), 1)
    assert str(caught.value) == (
        f"{changed}: was saved with student.lora.{field}: {then}, but the student has {now}. "
        "Resume with the student and the checkpoint of the same run."
    )
    same(published(learner), before)
    assert learner.policy_version == 0


def test_states_with_and_without_adapters_are_not_interchangeable(one, start, tiny, tmp_path):
    learner, directory = one
    whole = start(tiny, lora=None, ranks=1, zero_stage=0)
    whole.save(str(tmp_path))
    for restored, state, message in (
        (whole, directory, r"student\.lora\.alpha: 12, but the student has \(none\)"),
        (learner, tmp_path, r"student\.lora\.alpha: \(none\), but the student has 12"),
    ):
        with pytest.raises(ModelError, match=message):
            restored.restore(str(state), 1)
    whole.kill()


def test_adapters_of_another_model_are_refused(one, two, tiny, wide):
    _, directory = one
    with pytest.raises(ModelError, match=r"student\.model: weights with digest .* has weights"):
        two[0].restore(str(directory), 1)


# --- export and sync


def test_the_exported_student_and_its_adapter(begun, counts, tmp_path):
    """The merged model needs no peft. The adapter on its base model gives the same outputs."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    learner, models = begun
    steps(learner, models, counts)
    learner.export(str(tmp_path / "student"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["student", "student_adapter"]
    exported, layers = load_file(tmp_path / "student" / "model.safetensors"), published(learner)
    same({name: exported[name] for name in layers}, layers)
    assert AutoTokenizer.from_pretrained(tmp_path / "student").chat_template
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert not any("lora" in name for name, _ in merged.named_parameters())
    base = AutoModelForCausalLM.from_pretrained(models["student"])
    with torch.no_grad():
        before = base(IDS).logits
        adapted = PeftModel.from_pretrained(base, tmp_path / "student_adapter")
        expected = defined_now(models, weights(learner))(IDS).logits
        assert torch.allclose(merged(IDS).logits, expected, atol=1e-4)
        assert torch.allclose(adapted(IDS).logits, expected, atol=1e-4)
        assert (expected - before).abs().max() > 0.05
    back = adapted.merge_and_unload()
    for name, weight in merged.named_parameters():
        assert torch.allclose(back.get_parameter(name), weight, atol=1e-6), name


def defined_now(models, state):
    """Return the student with adapters A and B of ``state``."""
    model, low = defined(models, state)
    with torch.no_grad():
        for where, layer in low.items():
            layer.b.copy_(state[f"{where}.lora_B.default.weight"])
    return model


@pytest.fixture(scope="module")
def exported(one, tiny, counts, tmp_path_factory):
    """Student after three steps."""
    learner, first = one
    learner.restore(str(first), 0)
    steps(learner, tiny, counts, 3)
    directory = tmp_path_factory.mktemp("run") / "student"
    learner.export(str(directory))
    return directory


@pytest.fixture(scope="module")
def engine(local_ray, exported):
    """Engine of the exported student, whose adapted layers differ from the initial model's."""
    environment = {"env_vars": PLAN.environment()}
    actor = remote(RolloutActor).options(runtime_env=environment).remote((0,), "student")
    wait(actor.start.remote(str(exported), EngineConfig(kv_cache_gib=0.1), 512))
    yield actor
    local_ray.kill(actor)


def scores(engine):
    return torch.tensor(wait(engine.logprobs.remote(IDS[0].tolist())))


def test_an_engine_loads_the_exported_student(engine, exported):
    model = load_causal_lm(str(exported), "float32", "model")
    with torch.no_grad():
        logprobs = torch.log_softmax(model(IDS).logits[0, :-1], -1)
    expected = logprobs.gather(-1, IDS[0, 1:, None]).squeeze(-1)
    assert (scores(engine) - expected).abs().max() <= 1e-3


def test_engine_and_learner_agree(one, engine, tiny, counts, prompts):
    """The engine has merged weights and the learner adapters. They agree before the first step and
    after ten steps."""
    learner, first = one
    learner.restore(str(first), 0)
    logprobs = {}
    for number in (0, 10):
        steps(learner, tiny, counts, number)
        wait(engine.load.remote(learner.publish(), None))
        rollouts = completions(engine.sample.remote(prompts, [1, 2, 3, 4], [2] * 4, 24, 1.0, 1.0))
        assert rollouts[0].policy_version == number
        measured = learner.measure(rollouts, {})
        for r in rollouts:
            expected = measured[r.sample_id]["student_logprob"]
            assert list(r.rollout_logprobs) == pytest.approx(expected, abs=1e-3)
        logprobs[number] = scores(engine)
    assert (logprobs[0] - logprobs[10]).abs().mean() > 0.05, "ten steps change the log-probs"
