"""Chunked statistics compared with the definitions on full logits and with autograd."""

from __future__ import annotations

import pytest
import torch

from seqkd.learner import token_stats as module
from seqkd.learner.teacher_distribution import FullTeacher, TopTeacher
from seqkd.learner.token_stats import STATS, stats_of_logits, token_loss, token_stats
from seqkd.models import output_head
from seqkd.models.output_head import OutputHead, top_teacher
from seqkd.types import Divergence, EndStat

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


def set_chunk_sizes(monkeypatch, chunk, block):
    """Set the number of states per matrix product and per block."""
    monkeypatch.setitem(output_head.CHUNK_ELEMENTS, "cpu", chunk * V)
    monkeypatch.setitem(output_head.BLOCK_ELEMENTS, "cpu", block * V)


def teacher(s):
    return FullTeacher(s["teacher_hidden"], OutputHead(s["teacher_weight"]))


AT_ONCE = [(1, 1), (4, 4), (5, 2), (100, 3), (100, 100)]


@pytest.mark.parametrize("at_once", AT_ONCE)
@pytest.mark.parametrize("options", [{}, {"scale": 0.5}, {"softcap": 2.0}], ids=str)
def test_values_and_gradients_match_the_definitions(setup, monkeypatch, at_once, options):
    set_chunk_sizes(monkeypatch, *at_once)
    s = setup
    head = OutputHead(s["weight"], s["bias"], **options)
    stats = token_stats(s["hidden"], head, s["targets"], STATS, teacher(s))
    logits = s["hidden"] @ s["weight"].T + s["bias"]
    logits = logits * options.get("scale", 1.0)
    if "softcap" in options:
        logits = options["softcap"] * torch.tanh(logits / options["softcap"])
    expected = reference(logits, s["teacher_hidden"] @ s["teacher_weight"].T, s["targets"])
    weights = {name: torch.randn(N) for name in STATS}
    for name in STATS:
        assert torch.allclose(stats[name], expected[name], atol=1e-5), name

    def gradients(values):
        total = sum((weights[n] * values[n]).sum() for n in STATS if n != "teacher_logprob")
        return torch.autograd.grad(total, (s["hidden"], s["weight"], s["bias"]))

    for computed, exact in zip(gradients(stats), gradients(expected), strict=True):
        assert torch.allclose(computed, exact, atol=1e-4)


def test_monitored_statistics_do_not_change_the_gradient(setup):
    """A statistic that the loss does not use does not change the gradient."""
    s = setup
    args = (s["hidden"], OutputHead(s["weight"]), s["targets"])
    alone = token_stats(*args, ("reverse_kl",), teacher(s))["reverse_kl"].sum()
    together = token_stats(*args, STATS, teacher(s))["reverse_kl"].sum()
    assert torch.equal(*(torch.autograd.grad(x, s["weight"])[0] for x in (alone, together)))


def test_equal_models_have_no_divergence(setup):
    s = setup
    head = OutputHead(s["weight"])
    hidden = s["hidden"].detach()
    same = FullTeacher(hidden, OutputHead(s["weight"].detach()))
    stats = token_stats(s["hidden"], head, s["targets"], STATS, same)
    assert stats["reverse_kl"].abs().max() < 1e-6
    assert stats["forward_kl"].abs().max() < 1e-6
    assert torch.allclose(stats["student_logprob"], stats["teacher_logprob"])


def test_the_end_logprob_is_that_of_any_end_token(setup):
    """Without a teacher, and together with other statistics."""
    end = EndStat("end_logprob", (0, 3))
    head = OutputHead(setup["weight"], setup["bias"])
    stats = token_stats(setup["hidden"], head, setup["targets"], ("entropy", end))
    q = torch.softmax(setup["hidden"] @ setup["weight"].T + setup["bias"], -1)
    assert torch.allclose(stats[end], (q[:, 0] + q[:, 3]).log(), atol=1e-5)
    assert stats.keys() == {"entropy", end}


@pytest.mark.parametrize("at_once", AT_ONCE)
def test_statistics_that_separate_the_end_match_their_definitions(setup, monkeypatch, at_once):
    """With two end tokens, the values and the gradient of the sum."""
    set_chunk_sizes(monkeypatch, *at_once)
    s, ends = setup, (0, 3)
    s["targets"][:3] = torch.tensor([0, 3, 5])
    names = (EndStat("content_logprob", ends), EndStat("graded_kl", ends))
    stats = token_stats(s["hidden"], OutputHead(s["weight"]), s["targets"], names, teacher(s))
    q = torch.softmax(s["hidden"] @ s["weight"].T, -1)
    p = torch.softmax(s["teacher_hidden"] @ s["teacher_weight"].T, -1)
    stop, stop_p = q[:, ends].sum(-1), p[:, ends].sum(-1)
    others = [v for v in range(V) if v not in ends]
    content = torch.zeros(N)
    for row, target in enumerate(s["targets"].tolist()):
        if target not in ends:
            content[row] = (q[row, target] / q[row, others].sum()).log()
    graded = stop_p * (stop_p / stop).log() + (1 - stop_p) * ((1 - stop_p) / (1 - stop)).log()
    for part in (others, ends):
        a, b = q[:, part], p[:, part]
        share = a.sum(-1, keepdim=True)
        a, b = a / share, b / b.sum(-1, keepdim=True)
        graded = graded + share[:, 0].detach() * (a * (a / b).log()).sum(-1)
    for name, expected in zip(names, (content, graded), strict=True):
        assert torch.allclose(stats[name], expected, atol=1e-5), name
    totals = (sum((i + 1) * v.sum() for i, v in enumerate(values)) for values in
              ((stats[n] for n in names), (content, graded)))  # fmt: skip
    computed, exact = (torch.autograd.grad(t, (s["hidden"], s["weight"])) for t in totals)
    for a, b in zip(computed, exact, strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_no_tokens(setup):
    s = setup
    stats = token_stats(s["hidden"][:0], OutputHead(s["weight"]), s["targets"][:0], ("entropy",))
    assert stats["entropy"].shape == (0,)
    stats["entropy"].sum().backward()
    assert s["weight"].grad.abs().sum() == 0


@pytest.mark.parametrize("chunk", [4, 100])
@pytest.mark.filterwarnings("error")
def test_padded_vocabularies_are_cut_to_the_smaller(setup, monkeypatch, chunk):
    set_chunk_sizes(monkeypatch, chunk, 2)
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
    logprobs, ids, top = head.logprobs(s["hidden"].detach(), s["targets"])
    assert torch.allclose(logprobs, expected, atol=1e-5)
    assert ids is None and top is None


def logits_of(s):
    return s["hidden"] @ s["weight"].T, s["teacher_hidden"] @ s["teacher_weight"].T


def test_the_divergence_is_multiplied_by_the_squared_temperature(setup):
    s, names = setup, (Divergence("token_forward_kl", temperature=3.0), "reverse_kl")
    student_logits, teacher_logits = logits_of(s)
    q, p = torch.softmax(student_logits / 3, -1), torch.softmax(teacher_logits / 3, -1)
    stats = token_stats(s["hidden"], OutputHead(s["weight"]), s["targets"], names, teacher(s))
    assert torch.allclose(stats[names[0]], 9 * (p * (p / q).log()).sum(-1), atol=1e-5)
    plain = reference(student_logits, teacher_logits, s["targets"])["reverse_kl"]
    assert torch.allclose(stats["reverse_kl"], plain, atol=1e-5)


@pytest.mark.parametrize("kind", ["gjsd", "skew_kl", "skew_reverse_kl"])
def test_a_divergence_with_a_coefficient(setup, kind):
    s, name = setup, Divergence(kind, 0.3)
    student_logits, teacher_logits = logits_of(s)
    q, p = torch.softmax(student_logits, -1), torch.softmax(teacher_logits, -1)
    m, r = 0.3 * p + 0.7 * q, 0.3 * q + 0.7 * p
    expected = {
        "gjsd": 0.3 * (p * (p / m).log()).sum(-1) + 0.7 * (q * (q / m).log()).sum(-1),
        "skew_kl": (p * (p / m).log()).sum(-1),
        "skew_reverse_kl": (q * (q / r).log()).sum(-1),
    }[kind]
    stats = token_stats(s["hidden"], OutputHead(s["weight"]), s["targets"], (name,), teacher(s))
    assert torch.allclose(stats[name], expected, atol=1e-5)


KINDS = (
    "reverse_kl",
    "forward_kl",
    Divergence("gjsd", 0.5),
    Divergence("skew_kl", 0.1),
    Divergence("skew_reverse_kl", 0.1),
    Divergence("total_variation"),
)


def test_top_k_divergences_grow_with_k_to_the_full_divergence(setup):
    s = setup
    _, teacher_logits = logits_of(s)
    args = (s["hidden"], OutputHead(s["weight"]), s["targets"], KINDS)
    full = token_stats(*args, teacher(s))
    below = {name: torch.zeros(N) for name in KINDS}
    log_p = torch.log_softmax(teacher_logits, -1)
    for k in range(1, V):
        stats = token_stats(*args, TopTeacher(*top_teacher(log_p, k)))
        for name in KINDS:
            # Every increase of k splits the tail into two events, so a divergence can only grow.
            assert (stats[name] >= below[name] - 1e-5).all(), (name, k)
            assert (stats[name] <= full[name] + 1e-5).all(), (name, k)
            below[name] = stats[name]
    for name in KINDS:
        assert torch.allclose(below[name], full[name], atol=1e-5), name


def test_top_k_divergences_match_the_definition_over_k_plus_one_events(setup):
    s = setup
    student_logits, teacher_logits = logits_of(s)
    q, p = torch.softmax(student_logits, -1), torch.softmax(teacher_logits, -1)
    expected = []
    for row in range(N):
        top = sorted(range(V), key=lambda v: -p[row, v].item())[:3]
        a = [*(q[row, v] for v in top), 1 - sum(q[row, v] for v in top)]
        b = [*(p[row, v] for v in top), 1 - sum(p[row, v] for v in top)]
        expected.append(sum(x * (x / y).log() for x, y in zip(a, b, strict=True)))
    top = TopTeacher(*top_teacher(torch.log_softmax(teacher_logits, -1), 3))
    args = (s["hidden"], OutputHead(s["weight"]), s["targets"], ("reverse_kl",))
    stats = token_stats(*args, top)["reverse_kl"]
    assert torch.allclose(stats, torch.stack(expected), atol=1e-5)
    gradients = (torch.autograd.grad(x.sum(), s["hidden"])[0] for x in (stats, sum(expected)))
    assert torch.allclose(*gradients, atol=1e-4)


def test_an_output_head_returns_its_most_probable_tokens(setup, monkeypatch):
    set_chunk_sizes(monkeypatch, 4, 3)
    s = setup
    head = OutputHead(s["weight"].detach())
    logprobs = torch.log_softmax(s["hidden"].detach() @ s["weight"].detach().T, -1)
    _, ids, top = head.logprobs(s["hidden"].detach(), s["targets"], top_k=5)
    assert torch.allclose(top.exp().sum(-1), torch.ones(N), atol=1e-5)
    assert torch.allclose(top[:, :5], logprobs.gather(-1, ids.long()), atol=1e-6)
    assert torch.equal(ids.long(), logprobs.topk(5).indices)


def test_statistics_from_logits_equal_those_from_hidden_states(setup):
    s, names = setup, (*STATS, Divergence("gjsd", 0.3))
    student_logits, teacher_logits = logits_of(s)
    shaped = (x[:10].view(2, 5, -1) for x in (student_logits, teacher_logits))
    stats = stats_of_logits(*shaped, s["targets"][:10].view(2, 5), names)
    expected = token_stats(s["hidden"], OutputHead(s["weight"]), s["targets"], names, teacher(s))
    for name in names:
        assert stats[name].shape == (2, 5)
        assert torch.allclose(stats[name].flatten(), expected[name][:10], atol=1e-5), name


def test_bfloat16_is_close_to_float32(setup):
    """With hidden states and heads rounded to 8 bits, within 3 % and 0.03 nats."""
    s = setup
    names = (*STATS, Divergence("gjsd", 0.5))
    full = token_stats(s["hidden"], OutputHead(s["weight"]), s["targets"], names, teacher(s))
    low = {k: s[k].detach().bfloat16() for k in ("hidden", "weight", "teacher_hidden")}
    low_teacher = FullTeacher(low["teacher_hidden"], OutputHead(s["teacher_weight"].bfloat16()))
    half = token_stats(low["hidden"], OutputHead(low["weight"]), s["targets"], names, low_teacher)
    for name in names:
        assert half[name].dtype == torch.float32
        assert ((half[name] - full[name]).abs() <= 0.03 + 0.03 * full[name].abs()).all(), name


def test_published_vocabulary_sizes():
    """151,936 rows and 152,064 rows, as in two sizes of one model family, are cut to the smaller
    number."""
    torch.manual_seed(0)
    hidden, targets = torch.randn(3, 4), torch.tensor([0, 151_935, 7])
    student, teacher_weight = torch.randn(151_936, 4), torch.randn(152_064, 4)
    stats = token_stats(
        hidden, OutputHead(student), targets, STATS, FullTeacher(hidden, OutputHead(teacher_weight))
    )
    expected = reference(hidden @ student.T, hidden @ teacher_weight[:151_936].T, targets)
    for name in STATS:
        assert torch.allclose(stats[name], expected[name], atol=1e-4), name


# Three prompts with samples of these lengths, N states in total.
LENGTHS, GROUPS = (3, 1, 4, 2, 1), (0, 0, 1, 1, 2)
POSITION = torch.cat([torch.arange(n) for n in LENGTHS])
GROUP = torch.cat([torch.full((n,), g) for n, g in zip(LENGTHS, GROUPS, strict=True)])
MASK = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]


def future_loss(values):
    """Future costs minus the mean over the prompt's other samples at the position, times log q."""
    laid = {n: torch.zeros(MASK.shape).masked_scatter(MASK, v) for n, v in values.items()}
    cost = laid["reverse_kl"].detach()
    future = cost.flip(1).cumsum(1).flip(1) - cost
    same = torch.tensor(GROUPS)[:, None] == torch.tensor(GROUPS)
    others = (same & ~torch.eye(len(GROUPS), dtype=torch.bool)).float()
    future = future - others @ future / others.sum(1, keepdim=True).clamp(min=1)
    return ((future * laid["student_logprob"] + laid["reverse_kl"]) * MASK).sum() / 7


def reward_to_go_loss(values):
    """Costs from the token on, minus those of another sample at the same position, times log q."""
    laid = {n: torch.zeros(MASK.shape).masked_scatter(MASK, v) for n, v in values.items()}
    ahead = (laid["student_logprob"].detach() - laid["teacher_logprob"]).flip(1).cumsum(1).flip(1)
    return ((ahead - ahead[[1, 0, 3, 2, 4]]) * laid["student_logprob"] * MASK).sum()


def whole_sequence_loss(values):
    """Return of the whole sequence at every token, times log q."""
    laid = {n: torch.zeros(MASK.shape).masked_scatter(MASK, v) for n, v in values.items()}
    whole = (laid["student_logprob"].detach() - laid["teacher_logprob"]).sum(1, keepdim=True)
    return (whole * laid["student_logprob"]).sum()


def slightly_past_loss(values):
    """Slopes that change by at most 1 % with the costs of earlier tokens."""
    laid = {n: torch.zeros(MASK.shape).masked_scatter(MASK, v) for n, v in values.items()}
    cost = laid["reverse_kl"].detach()
    factor = 1 + 0.01 * (cost.cumsum(1) - cost).tanh()
    return (factor * laid["student_logprob"] * MASK).sum()


@pytest.mark.parametrize("at_once", [(1, 1), (2, 1), (5, 2), (5, 5), (100, 1), (100, 100)])
@pytest.mark.parametrize(
    ("objective", "passes"),
    [(future_loss, 1), (reward_to_go_loss, 1), (whole_sequence_loss, 2), (slightly_past_loss, 2)],
)
def test_a_loss_computes_logits_as_few_times_as_possible(
    setup, monkeypatch, objective, passes, at_once
):
    """Loss, gradients and statistics equal those of plain automatic differentiation. The logits of
    every state are computed once if the objective allows it."""
    set_chunk_sizes(monkeypatch, *at_once)
    s, head = setup, OutputHead(setup["weight"], setup["bias"])
    expected = reference(
        s["hidden"] @ s["weight"].T + s["bias"],
        s["teacher_hidden"] @ s["teacher_weight"].T,
        s["targets"],
    )
    sizes, raw = [], OutputHead.raw

    def counted(head, hidden, room=None):
        sizes.append(len(hidden))
        return raw(head, hidden, room)

    monkeypatch.setattr(OutputHead, "raw", counted)
    args = (s["hidden"], head, s["targets"], STATS, teacher(s), objective, POSITION, GROUP)
    loss, stats = token_loss(*args)
    leaves = (s["hidden"], s["weight"], s["bias"])
    computed = torch.autograd.grad(3 * loss, leaves)
    # A chunk of one state separates the two samples of a prompt at one position.
    assert sum(sizes) <= 2 * N * (2 if at_once == (1, 1) else passes)
    # The largest product has at most one state less than allowed, if a pair would not fit. It does
    # not depend on the size of the blocks.
    assert max(1, min(at_once[0], N) - 1) <= max(sizes) <= at_once[0]
    values = {name: v.detach() if name == "teacher_logprob" else v for name, v in expected.items()}
    exact = torch.autograd.grad(3 * objective(values), leaves)
    assert loss.item() == pytest.approx(objective(values).item(), rel=1e-5)
    for name in STATS:
        assert torch.allclose(stats[name], expected[name], atol=1e-5), name
    for a, b in zip(computed, exact, strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_a_loss_without_tokens(setup):
    s, none = setup, torch.zeros(0, dtype=torch.long)
    args = (s["hidden"][:0], OutputHead(s["weight"]), s["targets"][:0], ("student_logprob",))
    loss, _ = token_loss(*args, None, lambda v: v["student_logprob"].sum(), none, none)
    loss.backward()
    assert loss.item() == 0
    assert s["weight"].grad.abs().sum() == 0


def test_a_second_backward_pass_is_rejected(setup):
    """The first backward pass scales the gradients in place."""
    s, places = setup, (POSITION, GROUP)
    args = (s["hidden"], OutputHead(s["weight"]), s["targets"], ("student_logprob",), None)
    loss, _ = token_loss(*args, lambda v: v["student_logprob"].sum(), *places)
    loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="second backward pass"):
        loss.backward()


TEACHERS = {
    "hidden": teacher,
    "top k": lambda s: TopTeacher(
        *top_teacher((s["teacher_hidden"] @ s["teacher_weight"].T).log_softmax(-1), 4)
    ),
    "none": lambda s: None,
}


@pytest.mark.parametrize(("temperature", "same"), [(1.0, True), (2.0, False)])
def test_a_divergence_that_is_trained_and_monitored_is_computed_once(setup, temperature, same):
    """With equal definitions both names have the same value, and each has its own gradient."""
    s, head = setup, OutputHead(setup["weight"], setup["bias"])
    full_teacher = TEACHERS["hidden"](s)
    wanted = Divergence("token_reverse_kl", temperature=temperature)

    def gradient(*names):
        stats = token_stats(s["hidden"], head, s["targets"], names, full_teacher)
        return stats, torch.autograd.grad(sum(stats[n].sum() for n in names), s["hidden"])[0]

    both, together = gradient(wanted, "reverse_kl")
    (one, one_gradient), (other, other_gradient) = gradient(wanted), gradient("reverse_kl")
    assert torch.equal(both[wanted], one[wanted])
    assert torch.allclose(both["reverse_kl"], other["reverse_kl"])
    assert torch.allclose(together, one_gradient + other_gradient, atol=1e-6)
    assert torch.equal(both[wanted], both["reverse_kl"]) == same


@pytest.mark.parametrize("form", TEACHERS)
def test_fused_kernels_compute_the_same(setup, monkeypatch, form):
    """The code that a GPU always runs, compiled for the CPU: statistics and gradients."""
    s, compiled, calls = setup, torch.compile(module._read, fullgraph=True), []
    monkeypatch.setattr(module, "_fused", lambda: calls.append(True) or compiled)
    names = {
        "hidden": (
            *STATS,
            Divergence("gjsd", 0.5),
            *(EndStat(n, (3, 5)) for n in ("end_logprob", "content_logprob", "graded_kl")),
        ),
        "top k": ("student_logprob", "entropy", "reverse_kl", "forward_kl"),
        "none": ("student_logprob", "entropy"),
    }[form]
    head = OutputHead(s["weight"], s["bias"], scale=0.5, softcap=4.0)

    def gradients(fused):
        stats = token_stats(s["hidden"], head, s["targets"], names, TEACHERS[form](s), fused)
        total = sum((i + 1) * stats[n].sum() for i, n in enumerate(names))
        return stats, torch.autograd.grad(total, (s["hidden"], s["weight"], s["bias"]))

    expected, exact = gradients(fused=False)
    assert not calls
    stats, computed = gradients(fused=True)
    assert calls
    for name in names:
        assert torch.allclose(stats[name], expected[name], atol=1e-5), name
    for a, b in zip(computed, exact, strict=True):
        assert torch.allclose(a, b, atol=1e-4)
