"""Chunked statistics against full logits and autograd, written from the definitions."""

from __future__ import annotations

import pytest
import torch

from seqkd import token_stats as module
from seqkd.token_stats import STATS, FullTeacher, OutputHead, token_stats

N, H, V = 11, 6, 17


def reference(logits, teacher_logits, targets):
    q, p = torch.softmax(logits, -1), torch.softmax(teacher_logits, -1)
    rows = torch.arange(len(targets))
    return {
        "student_logprob": q[rows, targets].log(),
        "teacher_logprob": p[rows, targets].log(),
        "reverse_kl": (q * (q / p).log()).sum(-1),
        "forward_kl": (p * (p / q).log()).sum(-1),
        "entropy": -(q * q.log()).sum(-1),
    }


@pytest.fixture
def setup():
    torch.manual_seed(0)
    return {
        "hidden": torch.randn(N, H, requires_grad=True),
        "weight": torch.randn(V, H, requires_grad=True),
        "bias": torch.randn(V, requires_grad=True),
        "targets": torch.randint(V, (N,)),
        "teacher_hidden": torch.randn(N, 5),
        "teacher_weight": torch.randn(V, 5),
    }


def teacher(s):
    return FullTeacher(s["teacher_hidden"], OutputHead(s["teacher_weight"]))


@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("options", [{}, {"scale": 0.5}, {"softcap": 2.0}], ids=str)
def test_values_and_gradients(setup, monkeypatch, rows, options):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", rows * V)
    s = setup
    head = OutputHead(s["weight"], s["bias"], **options)
    found = token_stats(s["hidden"], head, s["targets"], STATS, teacher(s))
    logits = s["hidden"] @ s["weight"].T + s["bias"]
    logits = logits * options.get("scale", 1.0)
    if "softcap" in options:
        logits = options["softcap"] * torch.tanh(logits / options["softcap"])
    expected = reference(logits, s["teacher_hidden"] @ s["teacher_weight"].T, s["targets"])
    weights = {name: torch.randn(N) for name in STATS}
    for name in STATS:
        assert torch.allclose(found[name], expected[name], atol=1e-5), name

    def gradients(values):
        total = sum((weights[n] * values[n]).sum() for n in STATS if n != "teacher_logprob")
        return torch.autograd.grad(total, (s["hidden"], s["weight"], s["bias"]))

    for ours, theirs in zip(gradients(found), gradients(expected), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)


def test_monitored_statistics_get_no_gradient_from_the_loss(setup):
    """A statistic that the loss does not use changes no gradient."""
    s = setup
    args = (s["hidden"], OutputHead(s["weight"]), s["targets"])
    alone = token_stats(*args, ("reverse_kl",), teacher(s))["reverse_kl"].sum()
    beside = token_stats(*args, STATS, teacher(s))["reverse_kl"].sum()
    assert torch.equal(*(torch.autograd.grad(x, s["weight"])[0] for x in (alone, beside)))


def test_equal_models_have_no_divergence(setup):
    s = setup
    head = OutputHead(s["weight"])
    hidden = s["hidden"].detach()
    same = FullTeacher(hidden, OutputHead(s["weight"].detach()))
    found = token_stats(s["hidden"], head, s["targets"], STATS, same)
    assert found["reverse_kl"].abs().max() < 1e-6
    assert found["forward_kl"].abs().max() < 1e-6
    assert torch.allclose(found["student_logprob"], found["teacher_logprob"])


def test_no_tokens(setup):
    s = setup
    found = token_stats(s["hidden"][:0], OutputHead(s["weight"]), s["targets"][:0], ("entropy",))
    assert found["entropy"].shape == (0,)
    found["entropy"].sum().backward()
    assert s["weight"].grad.abs().sum() == 0


def test_padded_vocabularies_are_read_up_to_the_shorter(setup):
    s = setup
    wider = OutputHead(torch.cat([s["teacher_weight"], torch.randn(4, 5)]))
    args = (s["hidden"], OutputHead(s["weight"]), s["targets"], STATS)
    padded = token_stats(*args, FullTeacher(s["teacher_hidden"], wider))
    plain = token_stats(*args, teacher(s))
    for name in STATS:
        assert torch.equal(padded[name], plain[name])


def test_head_logprobs(setup):
    s = setup
    head = OutputHead(s["weight"].detach(), s["bias"].detach())
    logits = s["hidden"] @ s["weight"].T + s["bias"]
    expected = torch.log_softmax(logits, -1)[torch.arange(N), s["targets"]]
    found, ids, top = head.logprobs(s["hidden"].detach(), s["targets"])
    assert torch.allclose(found, expected, atol=1e-5)
    assert ids is None and top is None
