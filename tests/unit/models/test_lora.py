"""Adapters compared with their definition, invalid targets, and a frozen output head."""

from __future__ import annotations

import re

import pytest
import torch
import yaml
from torch.utils._python_dispatch import TorchDispatchMode

from seqkd.checks.memory import GIB, estimate, size_of
from seqkd.checks.preflight import check
from seqkd.config.run import Config, dump, load
from seqkd.config.student import LoraConfig, PruneInitConfig, StudentConfig
from seqkd.errors import ConfigError, ModelError
from seqkd.learner.token_stats import token_stats
from seqkd.models import output_head
from seqkd.models.loading import load_causal_lm
from seqkd.models.lora import Adapters, adapted_layers, check_targets
from seqkd.models.output_head import OutputHead
from tests.conftest import ROOT
from tests.unit.config.test_config import MINIMAL

NAMES = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
IDS = torch.arange(5, 25)[None]


def student(tiny, precision="float32"):
    return load_causal_lm(tiny["student"], precision, "model")


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def adapter_weights(state, kind):
    return {name: t for name, t in state.items() if f".lora_{kind}." in name}


def fill(model, seed=7):
    """Replace the zeros of every B by random values."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if ".lora_B." in name:
            p.data.copy_(0.1 * torch.randn(p.shape, generator=generator))


# --- the configuration


def test_lora_is_off_by_default_and_survives_a_round_trip(tmp_path):
    assert Config.model_validate(MINIMAL).student.lora is None
    options = ({}, {"rank": 4, "targets": ["q_proj", "v_proj"]})
    for lora, expected in zip(
        options,
        (LoraConfig(rank=16, alpha=32, targets="all-linear"), LoraConfig(**options[1])),
        strict=True,
    ):
        config = Config.model_validate({**MINIMAL, "student": {"model": "a", "lora": lora}})
        assert config.student.lora == expected
        file = tmp_path / "again.yaml"
        file.write_text(dump(config))
        assert load(file) == config


def test_the_configuration_on_the_page_is_read():
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "lora.md").read_text(), re.DOTALL)
    config = Config.model_validate({**MINIMAL, **yaml.safe_load(text)})
    assert config.student.lora == LoraConfig()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rank=0", "student.lora.rank: 0: input should be greater than or equal to 1"),
        ("alpha=0", "student.lora.alpha: 0: input should be greater than or equal to 1"),
        ("dropout=0.1", "student.lora.dropout: unknown key"),
        ("targets=q_proj", "student.lora.targets: 'q_proj' is neither all-linear nor a list"),
        ("targets=[]", "student.lora.targets: [] is neither all-linear nor a list of layer"),
        ("targets=[1]", "student.lora.targets: [1] is neither all-linear nor a list of layer"),
    ],
)
def test_invalid_options_are_rejected(tiny_config, override, message):
    with pytest.raises(ConfigError) as caught:
        load(tiny_config, [f"student.lora.{override}"])
    (line,) = str(caught.value).splitlines()
    assert message in line


@pytest.mark.parametrize("name", ["q_prj", "mlp", "lm_head", "embed_tokens", "self_attn.q_proj"])
def test_a_target_that_the_model_does_not_have_is_rejected(tiny_config, name):
    config = load(tiny_config, [f"student.lora.targets=[v_proj, {name}]"])
    with pytest.raises(ConfigError) as caught:
        check(config)
    assert str(caught.value) == (
        f"student.lora.targets: {name!r} is not a linear layer of student.model. Its linear "
        f"layers: {', '.join(NAMES)}. Use some of them, or set student.lora.targets to all-linear."
    )
    check(load(tiny_config, ["student.lora.targets=[v_proj, up_proj]"]))


def test_a_model_without_linear_layers_is_rejected():
    """GPT-2 has its own layer class with a transposed matrix."""
    from transformers import GPT2Config

    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32)
    with pytest.raises(ModelError, match=r"student\.lora\.targets: 'all-linear' matches no linear"):
        check_targets(config, LoraConfig())


# --- the adapters


def test_all_linear_selects_all_layers_except_the_head_and_freezes_the_model(tiny):
    model = student(tiny)
    layers = adapted_layers(model, LoraConfig())
    blocks = {
        n: "mlp" if n in ("down_proj", "gate_proj", "up_proj") else "self_attn" for n in NAMES
    }
    expected = [f"model.layers.{i}.{block}.{n}" for i in range(2) for n, block in blocks.items()]
    assert sorted(layers) == sorted(expected)
    assert list(adapted_layers(model, LoraConfig(targets=("q_proj",)))) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
    ]
    Adapters(model, LoraConfig(rank=3), seed=0)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{n}.lora_{k}.default.weight" for n in layers for k in "AB"}


def test_the_initial_student_equals_the_model(tiny):
    model = student(tiny)
    before, logits = values(model), model(IDS).logits
    adapters = Adapters(model, LoraConfig(rank=4), seed=0)
    assert torch.equal(model(IDS).logits, logits)
    merged = adapters.merged(values(model))
    assert merged.keys() == before.keys()
    assert all(torch.equal(merged[name], weight) for name, weight in before.items())


def test_the_initial_values_depend_only_on_the_seed(tiny):
    def initial(seed, precision="float32", **options):
        model = student(tiny, precision)
        Adapters(model, LoraConfig(rank=4, **options), seed)
        return values(model)

    torch.manual_seed(1)
    one = initial(3)
    torch.manual_seed(2)
    again, other, low = initial(3), initial(4), initial(3, "bfloat16")
    some = initial(3, targets=("v_proj",))
    assert len(adapter_weights(one, "A")) == 14
    for name, a in adapter_weights(one, "A").items():
        assert torch.equal(again[name], a), name
        assert torch.equal(low[name], a.bfloat16()), name
        assert not torch.equal(other[name], a), name
        bound = a.shape[1] ** -0.5
        assert 0.9 * bound < a.abs().max() <= bound
        assert a.std() == pytest.approx(bound / 3**0.5, rel=0.15)  # uniform distribution
    assert len({a.flatten()[0].item() for a in adapter_weights(one, "A").values()}) == 14
    assert all(torch.equal(one[name], a) for name, a in adapter_weights(some, "A").items())
    assert not any(b.any() for b in adapter_weights(one, "B").values())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_merged_weights_match_the_definition(tiny, precision):
    """Merged weights are W + (alpha / rank) B A. In bfloat16 they are rounded once."""
    model = student(tiny, precision)
    base = values(model)
    adapters = Adapters(
        model, LoraConfig(rank=4, alpha=12, targets=("q_proj", "down_proj")), seed=0
    )
    fill(model)
    state = values(model)
    merged = adapters.merged(state)
    assert merged.keys() == base.keys()
    for name, weight in base.items():
        layer = name.removesuffix(".weight")
        if not layer.endswith(("q_proj", "down_proj")):
            assert torch.equal(merged[name], weight)
            continue
        a, b = (state[f"{layer}.lora_{k}.default.weight"].double() for k in "AB")
        expected = weight.double() + 3 * torch.einsum("or,ri->oi", b, a)
        assert merged[name].dtype == weight.dtype
        rounding = {"float32": 1e-6, "bfloat16": 2**-8}[precision]
        assert torch.allclose(merged[name].double(), expected, rtol=rounding, atol=1e-6), name
        assert (expected - weight.double()).abs().max() > 0.1


@pytest.mark.parametrize(
    ("targets", "modules"),
    [(("q_proj",), (".self_attn.",)), (("up_proj", "v_proj"), (".self_attn.", ".mlp."))],
)
def test_all_layers_of_a_module_with_an_adapted_layer_are_published(tiny, targets, modules):
    model = student(tiny)
    names = [name for name in values(model) if any(module in name for module in modules)]
    adapters = Adapters(model, LoraConfig(rank=4, targets=targets), seed=0)
    fill(model)
    merged, published = adapters.merged(values(model)), adapters.published(values(model))
    assert sorted(published) == sorted(names)
    assert all(torch.equal(weight, merged[name]) for name, weight in published.items())


def test_peft_reads_the_exported_adapters(tiny, tmp_path):
    from peft import PeftModel

    model = student(tiny)
    adapters = Adapters(model, LoraConfig(rank=4, targets=("v_proj", "up_proj")), seed=0)
    fill(model)
    adapters.export(values(model), tmp_path / "adapter")
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    plain = student(tiny)
    before = plain(IDS).logits
    loaded = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    assert torch.allclose(loaded(IDS).logits, model(IDS).logits, atol=1e-5)
    assert not torch.allclose(loaded(IDS).logits, before, atol=0.1)
    assert loaded.peft_config["default"].base_model_name_or_path == tiny["student"]


def test_the_identity_depends_on_the_model_and_the_options(tiny):
    def identity(which="student", precision="float32", **options):
        model = load_causal_lm(tiny[which], precision, "model")
        return Adapters(model, LoraConfig(**options), seed=0).identity

    one = identity()
    assert one == identity(precision="bfloat16") == identity(targets=tuple(NAMES))
    assert one["student.lora.targets"] == ", ".join(NAMES)
    for key, other in (
        ("student.model", identity("teacher")),
        ("student.lora.rank", identity(rank=8)),
        ("student.lora.alpha", identity(alpha=16)),
        ("student.lora.targets", identity(targets=("q_proj",))),
    ):
        assert [k for k in one if one[k] != other[k]] == [key]


# --- memory


@pytest.mark.parametrize("stage", [0, 3])
def test_the_memory_of_a_learner_with_adapters(tiny, stage):
    """Compute the tiny student's memory by hand: hidden size 64, MLP 128, queries 64, keys and
    values 32, two layers. Only the adapters have gradients and moments."""
    from transformers import AutoConfig

    shapes = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64)]
    adapters = 2 * sum(4 * (i + o) for i, o in shapes)
    whole = 320 * 64 + 2 * (sum(i * o for i, o in shapes) + 2 * 64) + 64
    config = {
        **MINIMAL,
        "student": {"model": "s", "lora": {"rank": 4}},
        "learner": {"zero_stage": stage, "ranks": 2},
        "evaluation": {"prompts": 0},
    }
    model = AutoConfig.from_pretrained(tiny["student"])
    needs = estimate(Config.model_validate(config), model, {"": model}, ("learner",))
    parts = {need.role: need for need in needs}["learner"].parts
    per = {0: (4, 4, 8), 3: (2, 2, 8)}[stage]  # bytes: weights, gradients, optimizer
    assert parts["weights"] == pytest.approx((whole + adapters) * per[0] / GIB)
    assert parts["gradients"] == pytest.approx(adapters * per[1] / GIB)
    assert parts["optimizer"] == pytest.approx(adapters * per[2] / GIB)
    assert parts["merged weights"] == pytest.approx(2 * sum(i * o for i, o in shapes) * 4 / GIB)
    built = student(tiny)
    Adapters(built, LoraConfig(rank=4), seed=0)
    counted = sum(p.numel() for p in built.parameters() if p.requires_grad)
    assert counted == adapters


def test_a_pruned_student_has_adapters_only_in_its_remaining_layers(tiny):
    from transformers import AutoConfig

    model = AutoConfig.from_pretrained(tiny["teacher"])
    lora = LoraConfig(rank=2, targets=("q_proj",))
    whole = size_of(model, StudentConfig(model="s", lora=lora))
    pruned = size_of(
        model, StudentConfig(model="s", lora=lora, init=PruneInitConfig(drop_layers=(1, 2)))
    )
    assert (whole.adapters, pruned.adapters) == (4 * 2 * 128, 3 * 2 * 128)


# --- a frozen output head


class Shapes(TorchDispatchMode):
    """Set of the operations that ran and the shapes of their results."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.seen.add((func.__name__.split(".")[0], tuple(out.shape)))
        return out


def test_no_gradient_is_computed_for_a_frozen_head(monkeypatch):
    """The gradient of the states is the same, without a tensor of the size of the head."""
    monkeypatch.setitem(output_head.CHUNK_ELEMENTS, "cpu", 4 * 17)
    torch.manual_seed(0)
    hidden, weight = torch.randn(11, 6, requires_grad=True), torch.randn(17, 6)
    bias, targets = torch.randn(17), torch.randint(17, (11,))
    gradients, operations = {}, {}
    for trained in (True, False):
        w, b = (t.clone().requires_grad_(trained) for t in (weight, bias))
        stats = token_stats(hidden, OutputHead(w, b), targets, ("student_logprob", "entropy"))
        loss = (stats["student_logprob"] * torch.arange(11.0)).sum() + stats["entropy"].sum()
        with Shapes() as shapes:
            (gradients[trained],) = torch.autograd.grad(loss, hidden, retain_graph=trained)
            if trained:
                (head_gradient,) = torch.autograd.grad(loss, w)
                assert head_gradient.abs().sum() > 0
        operations[trained] = {name for name, shape in shapes.seen if shape in ((17, 6), (17,))}
    assert torch.equal(gradients[True], gradients[False])
    assert {"zeros_like", "addmm_"} <= operations[True]
    assert not operations[False], operations[False]
