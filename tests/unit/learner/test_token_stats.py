"""Chunked statistics against full logits and autograd, written from the definitions."""

from __future__ import annotations

import pytest
import torch

from seqkd.learner import token_stats as module
from seqkd.learner.teacher_distribution import FullTeacher, TopTeacher
from seqkd.learner.token_stats import STATS, stats_of_logits, token_loss, token_stats
from seqkd.models import output_head
from seqkd.models.output_head import OutputHead, top_teacher
from seqkd.types import Divergence, EndLogprob

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


def read_at_once(monkeypatch, chunk, block):
    """So many states in one product, of which so many are read at a time."""
    monkeypatch.setitem(output_head.CHUNK_ELEMENTS, "cpu", chunk * V)
    monkeypatch.setitem(output_head.BLOCK_ELEMENTS, "cpu", block * V)


def teacher(s):
    return FullTeacher(s["teacher_hidden"], OutputHead(s["teacher_weight"]))


AT_ONCE = [(1, 1), (4, 4), (5, 2), (100, 3), (100, 100)]


@pytest.mark.parametrize("at_once", AT_ONCE)
@pytest.mark.parametrize("options", [{}, {"scale": 0.5}, {"softcap": 2.0}], ids=str)
def test_values_and_gradients(setup, monkeypatch, at_once, options):
    read_at_once(monkeypatch, *at_once)
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


def test_the_probability_of_an_end_is_that_of_any_of_its_tokens(setup):
    """Without a teacher, and beside other statistics."""
    end = EndLogprob((0, 3))
    head = OutputHead(setup["weight"], setup["bias"])
    found = token_stats(setup["hidden"], head, setup["targets"], ("entropy", end))
    q = torch.softmax(setup["hidden"] @ setup["weight"].T + setup["bias"], -1)
    assert torch.allclose(found[end], (q[:, 0] + q[:, 3]).log(), atol=1e-5)
    assert found.keys() == {"entropy", end}


def test_no_tokens(setup):
    s = setup
    found = token_stats(s["hidden"][:0], OutputHead(s["weight"]), s["targets"][:0], ("entropy",))
    assert found["entropy"].shape == (0,)
    found["entropy"].sum().backward()
    assert s["weight"].grad.abs().sum() == 0


@pytest.mark.parametrize("chunk", [4, 100])
@pytest.mark.filterwarnings("error")
def test_padded_vocabularies_are_read_up_to_the_shorter(setup, monkeypatch, chunk):
    read_at_once(monkeypatch, chunk, 2)
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


def logits_of(s):
    return s["hidden"] @ s["weight"].T, s["teacher_hidden"] @ s["teacher_weight"].T


def test_temperature_divides_the_logits_and_its_square_multiplies(setup):
    s, names = setup, (Divergence("token_forward_kl", temperature=3.0), "reverse_kl")
    ours, theirs = logits_of(s)
    q, p = torch.softmax(ours / 3, -1), torch.softmax(theirs / 3, -1)
    found = token_stats(s["hidden"], OutputHead(s["weight"]), s["targets"], names, teacher(s))
    assert torch.allclose(found[names[0]], 9 * (p * (p / q).log()).sum(-1), atol=1e-5)
    plain = reference(ours, theirs, s["targets"])["reverse_kl"]
    assert torch.allclose(found["reverse_kl"], plain, atol=1e-5)


@pytest.mark.parametrize("kind", ["gjsd", "skew_kl", "skew_reverse_kl"])
def test_a_divergence_with_a_coefficient(setup, kind):
    s, name = setup, Divergence(kind, 0.3)
    ours, theirs = logits_of(s)
    q, p = torch.softmax(ours, -1), torch.softmax(theirs, -1)
    m, r = 0.3 * p + 0.7 * q, 0.3 * q + 0.7 * p
    expected = {
        "gjsd": 0.3 * (p * (p / m).log()).sum(-1) + 0.7 * (q * (q / m).log()).sum(-1),
        "skew_kl": (p * (p / m).log()).sum(-1),
        "skew_reverse_kl": (q * (q / r).log()).sum(-1),
    }[kind]
    found = token_stats(s["hidden"], OutputHead(s["weight"]), s["targets"], (name,), teacher(s))
    assert torch.allclose(found[name], expected, atol=1e-5)


KINDS = (
    "reverse_kl",
    "forward_kl",
    Divergence("gjsd", 0.5),
    Divergence("skew_kl", 0.1),
    Divergence("skew_reverse_kl", 0.1),
    Divergence("total_variation"),
)


def test_top_k_divergences_are_true_ones_below_the_whole_and_converge(setup):
    s = setup
    _, theirs = logits_of(s)
    args = (s["hidden"], OutputHead(s["weight"]), s["targets"], KINDS)
    whole = token_stats(*args, teacher(s))
    below = {name: torch.zeros(N) for name in KINDS}
    for k in range(1, V):
        found = token_stats(*args, TopTeacher(*top_teacher(torch.log_softmax(theirs, -1), k)))
        for name in KINDS:
            # Each k splits one event of the last: a divergence can only grow.
            assert (found[name] >= below[name] - 1e-5).all(), (name, k)
            assert (found[name] <= whole[name] + 1e-5).all(), (name, k)
            below[name] = found[name]
    for name in KINDS:
        assert torch.allclose(below[name], whole[name], atol=1e-5), name


def test_top_k_is_the_definition_over_k_plus_one_events(setup):
    s = setup
    ours, theirs = logits_of(s)
    q, p = torch.softmax(ours, -1), torch.softmax(theirs, -1)
    expected = []
    for row in range(N):
        top = sorted(range(V), key=lambda v: -p[row, v].item())[:3]
        a = [*(q[row, v] for v in top), 1 - sum(q[row, v] for v in top)]
        b = [*(p[row, v] for v in top), 1 - sum(p[row, v] for v in top)]
        expected.append(sum(x * (x / y).log() for x, y in zip(a, b, strict=True)))
    known = TopTeacher(*top_teacher(torch.log_softmax(theirs, -1), 3))
    args = (s["hidden"], OutputHead(s["weight"]), s["targets"], ("reverse_kl",))
    found = token_stats(*args, known)["reverse_kl"]
    assert torch.allclose(found, torch.stack(expected), atol=1e-5)
    gradients = (torch.autograd.grad(x.sum(), s["hidden"])[0] for x in (found, sum(expected)))
    assert torch.allclose(*gradients, atol=1e-4)


def test_an_output_head_names_its_most_probable_tokens(setup, monkeypatch):
    read_at_once(monkeypatch, 4, 3)
    s = setup
    head = OutputHead(s["weight"].detach())
    every = torch.log_softmax(s["hidden"].detach() @ s["weight"].detach().T, -1)
    _, ids, top = head.logprobs(s["hidden"].detach(), s["targets"], top_k=5)
    assert torch.allclose(top.exp().sum(-1), torch.ones(N), atol=1e-5)
    assert torch.allclose(top[:, :5], every.gather(-1, ids.long()), atol=1e-6)
    assert torch.equal(ids.long(), every.topk(5).indices)


def test_from_logits_as_from_hidden_states(setup):
    s, names = setup, (*STATS, Divergence("gjsd", 0.3))
    ours, theirs = logits_of(s)
    shaped = (x[:10].view(2, 5, -1) for x in (ours, theirs))
    found = stats_of_logits(*shaped, s["targets"][:10].view(2, 5), names)
    expected = token_stats(s["hidden"], OutputHead(s["weight"]), s["targets"], names, teacher(s))
    for name in names:
        assert found[name].shape == (2, 5)
        assert torch.allclose(found[name].flatten(), expected[name][:10], atol=1e-5), name


def test_bfloat16_is_near_float32(setup):
    """Hidden states and heads rounded to 8 bits: within 3 % and 0.03 nats."""
    s = setup
    names = (*STATS, Divergence("gjsd", 0.5))
    full = token_stats(s["hidden"], OutputHead(s["weight"]), s["targets"], names, teacher(s))
    low = {k: s[k].detach().bfloat16() for k in ("hidden", "weight", "teacher_hidden")}
    known = FullTeacher(low["teacher_hidden"], OutputHead(s["teacher_weight"].bfloat16()))
    half = token_stats(low["hidden"], OutputHead(low["weight"]), s["targets"], names, known)
    for name in names:
        assert half[name].dtype == torch.float32
        assert ((half[name] - full[name]).abs() <= 0.03 + 0.03 * full[name].abs()).all(), name


def test_vocabularies_as_published():
    """151,936 rows against 152,064, as in two sizes of one model family: read up to the shorter."""
    torch.manual_seed(0)
    hidden, targets = torch.randn(3, 4), torch.tensor([0, 151_935, 7])
    student, known = torch.randn(151_936, 4), torch.randn(152_064, 4)
    found = token_stats(
        hidden, OutputHead(student), targets, STATS, FullTeacher(hidden, OutputHead(known))
    )
    expected = reference(hidden @ student.T, hidden @ known[:151_936].T, targets)
    for name in STATS:
        assert torch.allclose(found[name], expected[name], atol=1e-4), name


# Three prompts with samples of these lengths: N states in all.
LENGTHS, GROUPS = (3, 1, 4, 2, 1), (0, 0, 1, 1, 2)
POSITION = torch.cat([torch.arange(n) for n in LENGTHS])
GROUP = torch.cat([torch.full((n,), g) for n, g in zip(LENGTHS, GROUPS, strict=True)])
MASK = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]


def of_the_future(values):
    """Costs to come, less the mean of the prompt's other samples there, times log q."""
    laid = {n: torch.zeros(MASK.shape).masked_scatter(MASK, v) for n, v in values.items()}
    cost = laid["reverse_kl"].detach()
    future = cost.flip(1).cumsum(1).flip(1) - cost
    same = torch.tensor(GROUPS)[:, None] == torch.tensor(GROUPS)
    others = (same & ~torch.eye(len(GROUPS), dtype=torch.bool)).float()
    future = future - others @ future / others.sum(1, keepdim=True).clamp(min=1)
    return ((future * laid["student_logprob"] + laid["reverse_kl"]) * MASK).sum() / 7


def of_costs_from_here_on(values):
    """A baseline that looks at the same position of the prompt's other samples."""
    laid = {n: torch.zeros(MASK.shape).masked_scatter(MASK, v) for n, v in values.items()}
    ahead = (laid["student_logprob"].detach() - laid["teacher_logprob"]).flip(1).cumsum(1).flip(1)
    return ((ahead - ahead[[1, 0, 3, 2, 4]]) * laid["student_logprob"] * MASK).sum()


def of_the_whole(values):
    """The whole sequence's return at every token."""
    laid = {n: torch.zeros(MASK.shape).masked_scatter(MASK, v) for n, v in values.items()}
    whole = (laid["student_logprob"].detach() - laid["teacher_logprob"]).sum(1, keepdim=True)
    return (whole * laid["student_logprob"]).sum()


@pytest.mark.parametrize("at_once", [(1, 1), (2, 1), (5, 2), (5, 5), (100, 1), (100, 100)])
@pytest.mark.parametrize(
    ("objective", "walks"), [(of_the_future, 1), (of_costs_from_here_on, 1), (of_the_whole, 2)]
)
def test_a_loss_forms_logits_as_often_as_it_must(setup, monkeypatch, objective, walks, at_once):
    """Loss, gradients and statistics are those of plain automatic differentiation, with every
    state's logits formed once where the objective allows it."""
    read_at_once(monkeypatch, *at_once)
    s, head = setup, OutputHead(setup["weight"], setup["bias"])
    expected = reference(
        s["hidden"] @ s["weight"].T + s["bias"],
        s["teacher_hidden"] @ s["teacher_weight"].T,
        s["targets"],
    )
    formed, raw = [], OutputHead.raw

    def counted(head, hidden, room=None):
        formed.append(len(hidden))
        return raw(head, hidden, room)

    monkeypatch.setattr(OutputHead, "raw", counted)
    args = (s["hidden"], head, s["targets"], STATS, teacher(s), objective, POSITION, GROUP)
    loss, found = token_loss(*args)
    leaves = (s["hidden"], s["weight"], s["bias"])
    ours = torch.autograd.grad(3 * loss, leaves)
    # A chunk of one state cuts the two samples of a prompt at one position apart.
    assert sum(formed) <= 2 * N * (2 if at_once == (1, 1) else walks)
    # Of as many as may be but one, which a pair would not fit in; however few are read at a time.
    assert max(1, min(at_once[0], N) - 1) <= max(formed) <= at_once[0]
    values = {name: v.detach() if name == "teacher_logprob" else v for name, v in expected.items()}
    theirs = torch.autograd.grad(3 * objective(values), leaves)
    assert loss.item() == pytest.approx(objective(values).item(), rel=1e-5)
    for name in STATS:
        assert torch.allclose(found[name], expected[name], atol=1e-5), name
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_a_loss_of_no_tokens(setup):
    s, none = setup, torch.zeros(0, dtype=torch.long)
    args = (s["hidden"][:0], OutputHead(s["weight"]), s["targets"][:0], ("student_logprob",))
    loss, _ = token_loss(*args, None, lambda v: v["student_logprob"].sum(), none, none)
    loss.backward()
    assert loss.item() == 0
    assert s["weight"].grad.abs().sum() == 0


def test_a_second_backward_pass_is_refused(setup):
    """The first one has scaled the gradients where they are."""
    s, places = setup, (POSITION, GROUP)
    args = (s["hidden"], OutputHead(s["weight"]), s["targets"], ("student_logprob",), None)
    loss, _ = token_loss(*args, lambda v: v["student_logprob"].sum(), *places)
    loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="second backward pass"):
        loss.backward()


KNOWN = {
    "hidden": teacher,
    "top k": lambda s: TopTeacher(
        *top_teacher((s["teacher_hidden"] @ s["teacher_weight"].T).log_softmax(-1), 4)
    ),
    "none": lambda s: None,
}


@pytest.mark.parametrize(("temperature", "same"), [(1.0, True), (2.0, False)])
def test_what_is_learnt_and_reported_is_one_number(setup, temperature, same):
    """Where it is the same: each of both has its gradient."""
    s, head = setup, OutputHead(setup["weight"], setup["bias"])
    known = KNOWN["hidden"](s)
    wanted = Divergence("token_reverse_kl", temperature=temperature)

    def gradient(*names):
        found = token_stats(s["hidden"], head, s["targets"], names, known)
        return found, torch.autograd.grad(sum(found[n].sum() for n in names), s["hidden"])[0]

    both, together = gradient(wanted, "reverse_kl")
    (one, ours), (other, theirs) = gradient(wanted), gradient("reverse_kl")
    assert torch.equal(both[wanted], one[wanted])
    assert torch.allclose(both["reverse_kl"], other["reverse_kl"])
    assert torch.allclose(together, ours + theirs, atol=1e-6)
    assert torch.equal(both[wanted], both["reverse_kl"]) == same


@pytest.mark.parametrize("known", KNOWN)
def test_fused_kernels_compute_the_same(setup, monkeypatch, known):
    """What a GPU always runs, here compiled for the processor: statistics and gradients."""
    s, compiled, asked = setup, torch.compile(module._read, fullgraph=True), []
    monkeypatch.setattr(module, "_fused", lambda: asked.append(True) or compiled)
    names = {
        "hidden": (*STATS, Divergence("gjsd", 0.5), EndLogprob((3, 5))),
        "top k": ("student_logprob", "entropy", "reverse_kl", "forward_kl"),
        "none": ("student_logprob", "entropy"),
    }[known]
    head = OutputHead(s["weight"], s["bias"], scale=0.5, softcap=4.0)

    def gradients(fused):
        found = token_stats(s["hidden"], head, s["targets"], names, KNOWN[known](s), fused)
        total = sum((i + 1) * found[n].sum() for i, n in enumerate(names))
        return found, torch.autograd.grad(total, (s["hidden"], s["weight"], s["bias"]))

    expected, theirs = gradients(fused=False)
    assert not asked
    found, ours = gradients(fused=True)
    assert asked
    for name in names:
        assert torch.allclose(found[name], expected[name], atol=1e-5), name
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-4)
