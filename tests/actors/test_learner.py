"""DeepSpeed ranks compared with plain torch: the same update for all stages, ranks and
micro-batches."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, load_file, save_file

from actors.groups import LearnerGroup
from actors.learner import LearnerRank
from actors.placement import ActorPlan
from actors.pool import remote
from seqkd.config.learner import LearnerConfig
from seqkd.config.objectives import GJSDConfig, SequenceReverseKLConfig, TokenForwardKLConfig
from seqkd.config.phases import TermConfig
from seqkd.errors import ModelError
from seqkd.models.loading import load_causal_lm
from seqkd.protocols import Part
from seqkd.types import Counts, Rollout, TeacherScore

TERMS = (TermConfig(objective=SequenceReverseKLConfig(normalization="rate")),)
ENDS = (270, 290)
"""Tokens that end a completion."""
LR, STEPS = 1e-3, 2
KEPT = 5
"""Number of groups that are kept for later tests."""


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Models with a vocabulary of 2048. Their tied head has 131,072 weights, so ZeRO 3 partitions
    it (DeepSpeed does not partition tensors below 100,000 elements)."""
    from scripts.tiny_models import write_tiny

    folder = tmp_path_factory.mktemp("wide")
    return {
        "teacher": str(write_tiny(folder / "teacher", layers=4, seed=1, vocab_size=2048)),
        "student": str(write_tiny(folder / "student", layers=2, seed=2, vocab_size=2048)),
    }


@pytest.fixture(scope="module")
def batch(tiny):
    return scored(tiny)


def scored(models):
    """Return four prompts with two samples each, of different lengths, and the teacher's states."""
    generator = torch.Generator().manual_seed(0)
    teacher = load_causal_lm(models["teacher"], "float32", "model")
    rollouts, scores = [], {}
    for p in range(4):
        prompt = torch.randint(5, 260, (3 + 4 * p,), generator=generator).tolist()
        for i in range(2):
            completion = torch.randint(5, 260, (2 + 3 * i + p,), generator=generator).tolist()
            r = Rollout(
                str(p),
                f"{p}/0/{i}",
                tuple(prompt),
                tuple(completion),
                (0.0,) * len(completion),
                "student",
                0,
                "length",
            )
            with torch.no_grad():
                ids = torch.tensor([[*prompt, *completion]])
                states = teacher.model(ids).last_hidden_state[0, len(prompt) - 1 : -1]
            rollouts.append(r)
            scores[r.sample_id] = TeacherScore(r.sample_id, hidden=states)
    return rollouts, scores


@pytest.fixture
def counts(batch):
    tokens = sum(len(r.completion_ids) for r in batch[0])
    return Counts(sequences=8, tokens=tokens, rate=1.5, length=5.0)


def start(models, heads=None, environment=None, **options):
    """Return a learner group of new processes."""
    one = {"": (models["teacher"], "float32")}
    config = LearnerConfig(lr=LR, max_grad_norm=1.0, **options)
    plan = ActorPlan("learner", 0, threads=1, gpus=0, share=1, bundle=0)
    cls = remote(LearnerRank).options(
        runtime_env={"env_vars": plan.environment() | (environment or {})}
    )
    group = LearnerGroup(
        lambda: [cls.remote(config, None, 0, ENDS) for _ in range(config.ranks)],
        (models["student"], heads or one),
        config.micro_batch_tokens,
        models["student"],
    )
    group.ready()
    return group


@pytest.fixture
def new(local_ray):
    """Function that starts groups, which are killed at the end of the test."""
    with ExitStack() as ends:

        def started(*arguments, **options):
            group = start(*arguments, **options)
            ends.callback(group.kill)
            return group

        yield started


@pytest.fixture(scope="module")
def learners(local_ray, tmp_path_factory):
    """Function that returns groups in their initial state. Groups of earlier tests are restored."""
    kept: dict = {}

    def learner(models, **options):
        init_args = (models["student"], *sorted(options.items()))
        if init_args in kept:
            kept[init_args] = group, beginning = kept.pop(init_args)
            group.restore(str(beginning), 0)
            return group
        if len(kept) == KEPT:
            unused, _ = kept.pop(next(iter(kept)))
            unused.kill()
        group, beginning = start(models, **options), tmp_path_factory.mktemp("beginning")
        group.save(str(beginning))
        kept[init_args] = group, beginning
        return group

    yield learner
    for group, _ in kept.values():
        group.kill()


def listening(rank):
    """Addresses on which a rank's process listens."""
    connections = psutil.Process().net_connections("tcp")
    return [c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN]


def test_ranks_listen_on_the_address_of_their_node_only(local_ray, tiny):
    """Every Ray worker has one port on all interfaces, which is Ray's own."""
    group = start(tiny, ranks=2)
    try:
        addresses = local_ray.get([r.__ray_call__.remote(listening) for r in group.ranks])
        assert [sum(ip in ("::", "0.0.0.0") for ip in rank) for rank in addresses] == [1, 1]
        assert local_ray.util.get_node_ip_address() in addresses[0]
    finally:
        group.kill()


def trained(learner, batch, counts):
    """Return the results of STEPS steps, and the published weights."""
    results = [learner.step([Part(*batch, counts, TERMS)], LR) for _ in range(STEPS)]
    return results, published(learner)


@pytest.fixture(scope="module")
def reference(batch, tiny):
    return formula(tiny, batch)


def formula(models, batch):
    """Take the same steps in plain torch: full logits, one sequence at a time, the formula as
    written. Returns gradient norms, weights, and the smallest gradient of each weight."""
    rollouts, _ = batch
    model, teacher = (load_causal_lm(models[m], "float32", "model") for m in ("student", "teacher"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    norms, smallest, rate, length = [], {}, 1.5, 5.0
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
                future = sum(k.item() - rate for k in own[t + 1 :])
                baseline = sum(k.item() - rate for k in kls[other.sample_id][t + 1 :])
                loss = loss + own[t] + (future - baseline) * logprobs[r.sample_id][t]
        loss = loss / (len(rollouts) * length)
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        for name, p in model.named_parameters():
            size = p.grad.abs()
            smallest[name] = torch.minimum(smallest.get(name, size), size)
        optimizer.step()
    return norms, {name: p.detach() for name, p in model.named_parameters()}, smallest


@pytest.mark.parametrize(
    "options",
    [
        {"ranks": 1, "zero_stage": 0},
        {"ranks": 2, "zero_stage": 0, "micro_batch_tokens": 1},
        {"ranks": 2, "zero_stage": 2, "micro_batch_tokens": 1},
        {"ranks": 1, "zero_stage": 2, "micro_batch_tokens": 50, "compile": True},
        {"ranks": 2, "zero_stage": 3, "micro_batch_tokens": 50, "gradient_checkpointing": True},
    ],
    ids=lambda o: "-".join(f"{key}_{value}" for key, value in o.items()),
)
def test_the_update_follows_the_formula(learners, tiny, batch, counts, reference, options):
    updated_alike(trained(learners(tiny, **options), batch, counts), reference)


def updated_alike(actual, reference):
    """Compare updates. AdamW divides a gradient by its own size, so an error e in a gradient g
    causes an error of about lr e / g in the weight. Here e is below 2e-5 of the tensor's largest
    gradient, and weights of about 1 are rounded to 1e-7 in each step."""
    (results, state), (norms, expected, smallest) = actual, reference
    assert [r.grad_norm for r in results] == pytest.approx(norms, rel=1e-4)
    assert state.keys() == expected.keys()
    for name, weight in expected.items():
        share = smallest[name] / smallest[name].max()
        allowed = 3e-7 + LR * 2e-5 / share.clamp(min=1e-12)
        excess = (state[name] - weight).abs() / allowed
        assert excess.max() <= 1, name


def test_a_partitioned_head_gives_the_same_update(learners, wide, counts):
    """Each rank has several micro-batches, and gathers the head in every forward and backward
    pass."""
    batch = scored(wide)
    learner = learners(wide, ranks=2, zero_stage=3, micro_batch_tokens=1)
    updated_alike(trained(learner, batch, counts), formula(wide, batch))


def test_each_prompt_uses_the_head_of_its_own_teacher(learners, new, tiny, batch):
    """The student itself is the second teacher of half of the prompts, so their divergence is zero.
    Each micro-batch contains prompts of only one teacher."""
    rollouts, scores = batch
    itself = load_causal_lm(tiny["student"], "float32", "model")
    mixed = {}
    for r in rollouts:
        mixed[r.sample_id] = replace(scores[r.sample_id], teacher="other")
        if r.prompt_id in "02":
            with torch.no_grad():
                ids = torch.tensor([[*r.prompt_ids, *r.completion_ids]])
                states = itself.model(ids).last_hidden_state[0, len(r.prompt_ids) - 1 : -1]
            mixed[r.sample_id] = TeacherScore(r.sample_id, hidden=states, teacher="itself")
    heads = {"itself": (tiny["student"], "float32"), "other": (tiny["teacher"], "float32")}
    both = new(tiny, heads, ranks=2, micro_batch_tokens=50).measure(rollouts, mixed)
    alone = learners(tiny, ranks=1, zero_stage=0).measure(rollouts, scores)
    for r in rollouts:
        actual, expected = (m[r.sample_id]["forward_kl"] for m in (both, alone))
        expected = [0.0] * len(actual) if r.prompt_id in "02" else expected
        assert actual == pytest.approx(expected, abs=1e-5), r.sample_id
        assert max(alone[r.sample_id]["forward_kl"]) > 1


def test_bfloat16_takes_nearly_the_same_step(learners, tiny, batch, counts, reference):
    results, state = trained(
        learners(tiny, ranks=2, zero_stage=2, precision="bfloat16", micro_batch_tokens=1),
        batch,
        counts,
    )
    norms, expected, _ = reference
    # The first step starts from the same weights; later ones from weights rounded to 8 bits.
    assert results[0].grad_norm == pytest.approx(norms[0], rel=0.05)
    for name, weight in expected.items():
        assert state[name].dtype == torch.bfloat16
        assert (state[name].float() - weight).abs().max() <= 0.01, name
    # The bound alone would also hold without any update, so check the direction of the embedding's.
    name = "model.embed_tokens.weight"
    initial = load_causal_lm(tiny["student"], "float32", "model")
    start = initial.get_parameter(name).detach()
    moved, should = (state[name].float() - start).flatten(), (expected[name] - start).flatten()
    assert torch.cosine_similarity(moved, should, dim=0) > 0.5


def test_measuring_takes_no_step(learners, tiny, batch, counts):
    """Measured sums are per sample, agree with those of a step, and do not change the weights. With
    three prompts on two ranks, one rank gets an empty micro-batch."""
    rollouts, scores = batch
    learner = learners(tiny, ranks=2, zero_stage=2, micro_batch_tokens=1)
    odd = [r for r in rollouts if r.prompt_id != "3"]
    measured = learner.measure(odd, scores)
    assert measured.keys() == {r.sample_id for r in odd}
    again = learner.measure(rollouts, scores)
    for sample_id, sums in measured.items():
        assert sums["reverse_kl"] == pytest.approx(again[sample_id]["reverse_kl"], rel=1e-4)
    result = learner.step([Part(rollouts, scores, counts, TERMS)], LR)
    (part,) = result.parts
    for name in ("reverse_kl", "forward_kl", "entropy", "student_logprob", "teacher_logprob"):
        total = sum(sum(s[name]) for s in again.values())
        assert part.sums[name] == pytest.approx(total, rel=1e-4)
    assert part.sums["tokens"] == counts.tokens
    assert part.sums["sequences"] == counts.sequences
    lengths = [len(r.completion_ids) for r in rollouts]
    for t in range(max(lengths)):
        at_t = sum(s["reverse_kl"][t] for s in again.values() if t < len(s["reverse_kl"]))
        assert part.costs[t].item() == pytest.approx(at_t, rel=1e-4)
        assert part.survival[t].item() == sum(t < length for length in lengths)


def test_terms_of_several_samplers_and_a_mixture(learners, tiny, batch):
    """The loss 0.5 x reverse KL on a weighted mixture + 2 x (sft + GJSD at temperature 2) on other
    sequences, on two ranks, agrees with plain torch."""
    rollouts, scores = batch
    mixed, others = rollouts[:4], [replace(r, source="dataset") for r in rollouts[4:]]
    mixed = [replace(r, source="teacher") if i % 2 else r for i, r in enumerate(mixed)]
    counts = Counts(sequences=4, tokens=20, rate=1.5, length=5.0)
    reverse = TermConfig(
        sampler="mixture",
        objective=SequenceReverseKLConfig(estimator="reward_to_go", normalization="rate"),
        weight=0.5,
    )
    terms = (
        TermConfig(sampler="dataset", weight=2.0),
        TermConfig(sampler="dataset", objective=GJSDConfig(beta=0.3, temperature=2.0), weight=2.0),
    )
    model, teacher = (load_causal_lm(tiny[m], "float32", "model") for m in ("student", "teacher"))

    def logits(network, r):
        span = slice(len(r.prompt_ids) - 1, -1)
        return network(torch.tensor([[*r.prompt_ids, *r.completion_ids]])).logits[0, span]

    def drawn(network, r):
        logprobs = torch.log_softmax(logits(network, r), -1)
        return logprobs[torch.arange(len(logprobs)), list(r.completion_ids)]

    loss = torch.zeros(())
    future = {}
    for r in mixed:
        cost = (drawn(model, r) - drawn(teacher, r)).detach() - 1.5
        future[r.sample_id] = [cost[t:].sum().item() for t in range(len(cost))]
    for r in mixed:
        (other,) = [o for o in mixed if o.prompt_id == r.prompt_id and o is not r]
        q, p = drawn(model, r).sum().exp().item(), drawn(teacher, r).sum().exp().item()
        weight = q / (0.75 * q + 0.25 * p)
        for t, logprob in enumerate(drawn(model, r)):
            base = future[other.sample_id][t] if t < len(other.completion_ids) else 0.0
            returned = future[r.sample_id][t] - base
            loss = loss + 0.5 * weight * returned * logprob / (4 * 5.0)
    for r in others:
        loss = loss - 2 * drawn(model, r).sum() / 20
        q, p = (torch.softmax(logits(m, r) / 2, -1) for m in (model, teacher))
        m = 0.3 * p + 0.7 * q
        per_token = 0.3 * (p * (p / m).log()).sum(-1) + 0.7 * (q * (q / m).log()).sum(-1)
        loss = loss + 2 * 4 * per_token.sum() / 20
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()

    learner = learners(tiny, ranks=2, zero_stage=2, micro_batch_tokens=1)
    parts = [
        Part(mixed, {r.sample_id: scores[r.sample_id] for r in mixed}, counts, (reverse,), 0.25),
        Part(others, {r.sample_id: scores[r.sample_id] for r in others}, counts, terms),
    ]
    result = learner.step(parts, LR)
    assert result.grad_norm == pytest.approx(norm, rel=1e-4)
    assert result.loss == pytest.approx(loss.item(), rel=1e-4)
    assert result.parts[0].sums["sequences"] == result.parts[1].sums["sequences"] == 4
    assert result.parts[1].sums["weight"] == 4


def test_a_graded_end_on_two_ranks(learners, tiny, batch):
    """Neutral normalization with stop graded agrees with plain torch. Most completions end with one
    of two end tokens."""
    drawn, scores = batch
    rollouts = [
        replace(r, completion_ids=(*r.completion_ids[:-1], ENDS[i % 2])) if i % 3 else r
        for i, r in enumerate(drawn)
    ]
    # Positions without an earlier sequence have the mean cost 1.5.
    costs, survival = torch.tensor([8.0, 2.0]), torch.tensor([4.0, 2.0])
    counts = Counts(8, 40, rate=1.5, length=5.0, costs=costs, survival=survival)
    objective = SequenceReverseKLConfig(normalization="neutral", discount=0.8, stop="graded")
    model, teacher = (load_causal_lm(tiny[m], "float32", "model") for m in ("student", "teacher"))
    others = [v for v in range(model.config.vocab_size) if v not in ENDS]
    graded, returns, content = {}, {}, {}
    for r in rollouts:
        ids, span = torch.tensor([[*r.prompt_ids, *r.completion_ids]]), len(r.prompt_ids) - 1
        q, p = (torch.softmax(m(ids).logits[0, span:-1], -1) for m in (model, teacher))
        p = p.detach()
        kl = (q * (q / p).log()).sum(-1).tolist()
        parts = [(q[:, part], p[:, part]) for part in (list(ENDS), others)]
        graded[r.sample_id] = sum(
            b.sum(-1) * (b.sum(-1) / a.sum(-1)).log()
            + a.sum(-1).detach() * _kl(a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True))
            for a, b in parts
        ).sum()
        excess = [k - m for k, m in zip(kl, (2.0, 1.0, *[1.5] * len(kl)), strict=False)]
        returns[r.sample_id] = [
            sum(0.8 ** (u - t) * excess[u] for u in range(t + 1, len(kl))) for t in range(len(kl))
        ]
        content[r.sample_id] = [
            (q[t, token] / q[t, others].sum()).log()
            for t, token in enumerate(r.completion_ids)
            if token not in ENDS
        ]
    loss = torch.zeros(())
    for r in rollouts:
        (other,) = [o for o in rollouts if o.prompt_id == r.prompt_id and o is not r]
        loss = loss + graded[r.sample_id]
        for t, logprob in enumerate(content[r.sample_id]):
            base = returns[other.sample_id][t] if t < len(other.completion_ids) else 0.0
            loss = loss + (returns[r.sample_id][t] - base) * logprob
    loss = loss / (8 * 5.0)
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
    learner = learners(tiny, ranks=2, zero_stage=2, micro_batch_tokens=1)
    result = learner.step([Part(rollouts, scores, counts, (TermConfig(objective=objective),))], LR)
    assert result.loss == pytest.approx(loss.item(), rel=1e-4)
    assert result.grad_norm == pytest.approx(norm, rel=1e-4)


def _kl(a, b):
    return (a * (a / b).log()).sum(-1)


def steps(learner, batch, counts, number):
    return [learner.step([Part(*batch, counts, TERMS)], LR) for _ in range(number)]


def published(learner):
    """Return a copy of the published weights, because the next weights overwrite them."""
    return load(Path(learner.publish().path).read_bytes())


def whole(learner, directory):
    """Save the learner's full state to a new directory, and return its tensors by name."""
    directory.mkdir()
    learner.save(str(directory))
    state = {}
    for file in directory.iterdir():
        state |= load_file(file)
        with safe_open(file, framework="pt") as reader:
            state["steps"] = torch.tensor(int(reader.metadata()["optimizer_steps"]))
    return state


def same(state, expected):
    assert state.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(state[name], weight), name


@pytest.mark.parametrize(
    ("models", "options"),
    [
        ("tiny", {"ranks": 1, "zero_stage": 0}),
        ("tiny", {"ranks": 2, "zero_stage": 2, "micro_batch_tokens": 1}),
        ("wide", {"ranks": 2, "zero_stage": 3, "micro_batch_tokens": 1}),
        ("tiny", {"ranks": 2, "zero_stage": 2, "precision": "bfloat16", "micro_batch_tokens": 1}),
        ("tiny", {"ranks": 1, "zero_stage": 0, "precision": "bfloat16"}),
    ],
    ids=lambda o: "-".join(map(str, o.values())) if isinstance(o, dict) else o,
)
def test_a_restored_run_continues_bit_for_bit(
    learners, new, request, tmp_path, counts, models, options
):
    """Four steps in a row equal two steps after a restore in the same processes, plus two steps in
    new processes."""
    models = request.getfixturevalue(models)
    batch = scored(models)
    beginning, middle = tmp_path / "beginning", tmp_path / "middle"
    for directory in (beginning, middle):
        directory.mkdir()
    first = learners(models, **options)
    first.save(str(beginning))
    initial = published(first)
    straight = steps(first, batch, counts, 4)
    expected = published(first)
    assert not torch.equal(initial["model.norm.weight"], expected["model.norm.weight"])
    first.restore(str(beginning), 0)
    same(published(first), initial)
    again = steps(first, batch, counts, 2)
    first.save(str(middle))
    assert len(list(middle.iterdir())) == options["ranks"]

    second = new(models, **options)
    second.restore(str(middle), 2)
    assert second.policy_version == second.publish().policy_version == 2
    again += steps(second, batch, counts, 2)
    same(published(second), expected)
    assert [(r.loss, r.grad_norm) for r in again] == [(r.loss, r.grad_norm) for r in straight]


def test_other_ranks_stages_and_precisions_restore_the_same(learners, wide, tmp_path, counts):
    """A state of two ranks with ZeRO 3 is restored with one rank of ZeRO 0, with three ranks of
    ZeRO 3 (the weights are not divisible by three), and with bfloat16 (the same master weights)."""
    batch = scored(wide)
    first = learners(wide, ranks=2, zero_stage=3, micro_batch_tokens=1)
    steps(first, batch, counts, 2)
    state = whole(first, tmp_path / "first")
    saved = published(first)
    (after,) = steps(first, batch, counts, 1)
    expected = published(first)
    for index, options in enumerate(
        (
            {"ranks": 1, "zero_stage": 0},
            {"ranks": 3, "zero_stage": 3},
            {"ranks": 2, "zero_stage": 1, "precision": "bfloat16"},
        )
    ):
        other = learners(wide, **options)
        other.restore(str(tmp_path / "first"), 2)
        same(whole(other, tmp_path / str(index)), state)
        dtype = getattr(torch, options.get("precision", "float32"))
        same(published(other), {name: weight.to(dtype) for name, weight in saved.items()})
        (result,) = steps(other, batch, counts, 1)
        if dtype == torch.float32:
            assert result.loss == pytest.approx(after.loss, rel=1e-4)
            assert result.grad_norm == pytest.approx(after.grad_norm, rel=1e-4)
            now = published(other)
            for name, weight in expected.items():
                assert (now[name] - weight).abs().max() <= 1e-5, name


def test_the_state_of_another_student_is_refused(learners, tiny, wide, tmp_path):
    other = learners(wide, ranks=1, zero_stage=0)
    other.save(str(tmp_path))
    learner = learners(tiny, ranks=1, zero_stage=0)
    before = published(learner)
    with pytest.raises(ModelError, match=r"learner-00000.*embed_tokens.*\[2048, 64\].*\[320, 64\]"):
        learner.restore(str(tmp_path), 1)
    (file,) = tmp_path.iterdir()
    tensors = load_file(file)
    del tensors["exp_avg/model.norm.weight"]
    save_file(tensors, file, {"optimizer_steps": "0"})
    with pytest.raises(ModelError, match=r"exp_avg of .* model\.norm\.weight is missing"):
        other.restore(str(tmp_path), 1)
    assert learner.policy_version == other.policy_version == 0
    same(published(learner), before)


@pytest.mark.parametrize(
    ("models", "options"),
    [
        ("tiny", {"zero_stage": 0}),
        ("tiny", {"zero_stage": 0, "precision": "bfloat16"}),
        ("tiny", {"zero_stage": 1, "precision": "bfloat16"}),
        ("tiny", {"zero_stage": 2}),
        ("wide", {"zero_stage": 3}),
        ("wide", {"zero_stage": 3, "precision": "bfloat16"}),
    ],
    ids=lambda o: "-".join(map(str, o.values())) if isinstance(o, dict) else o,
)
def test_a_non_finite_step_is_skipped(learners, request, tmp_path, counts, models, options):
    """One of four micro-batches on two ranks has NaN scores. The step changes nothing on any rank,
    and the next step is the same as without it."""
    models = request.getfixturevalue(models)
    rollouts, scores = scored(models)
    bad = {
        name: replace(s, hidden=s.hidden * torch.nan) if name.startswith("1/") else s
        for name, s in scores.items()
    }
    learner = learners(models, ranks=2, micro_batch_tokens=1, **options)
    whole(learner, tmp_path / "beginning")
    steps(learner, (rollouts, scores), counts, 1)
    before = whole(learner, tmp_path / "before")
    weights = published(learner)
    (result,) = steps(learner, (rollouts, bad), counts, 1)
    assert result.skipped
    assert not math.isfinite(result.loss) and not math.isfinite(result.grad_norm)
    assert learner.policy_version == learner.publish().policy_version == 2
    same(whole(learner, tmp_path / "after"), before)
    same(published(learner), weights)
    (result,) = steps(learner, (rollouts, scores), counts, 1)
    assert not result.skipped
    expected = published(learner)
    assert not torch.equal(weights["model.norm.weight"], expected["model.norm.weight"])

    learner.restore(str(tmp_path / "beginning"), 0)
    steps(learner, (rollouts, scores), counts, 2)
    same(published(learner), expected)


def test_a_non_finite_loss_with_a_finite_gradient(learners, tiny, batch, counts):
    """A teacher with a tail of zero gives 0 x log 0 in the loss, but not in the gradient."""
    rollouts, _ = batch
    scores = {
        r.sample_id: TeacherScore(
            r.sample_id,
            top_ids=torch.tensor([[7]] * len(r.completion_ids), dtype=torch.int32),
            top_logprobs=torch.tensor(
                [[0.0, -torch.inf if r.prompt_id == "1" else -5.0]] * len(r.completion_ids)
            ),
            logprobs=torch.zeros(len(r.completion_ids)),
        )
        for r in rollouts
    }
    learner = learners(tiny, ranks=2, zero_stage=2, micro_batch_tokens=1)
    before = published(learner)
    terms = (TermConfig(objective=TokenForwardKLConfig()),)
    result = learner.step([Part(rollouts, scores, counts, terms)], LR)
    assert result.skipped and math.isnan(result.loss)
    same(published(learner), before)


def test_trained_samples_and_their_divergence_from_the_sampler(learners, tiny, batch, counts):
    """With three prompts on two ranks, one rank gets a filler micro-batch. Two of the prompts have
    one completion from the teacher."""
    rollouts, scores = batch
    generator = torch.Generator().manual_seed(1)
    drawn = []
    for r in rollouts[:6]:
        at_sampler = -5 - torch.rand(len(r.completion_ids), generator=generator)
        source = "teacher" if r.sample_id in ("0/0/1", "2/0/0") else "student"
        drawn.append(replace(r, rollout_logprobs=tuple(at_sampler.tolist()), source=source))
    model = load_causal_lm(tiny["student"], "float32", "model")
    tokens, k1, k3, ratios = 0, 0.0, 0.0, []
    for r in drawn:
        if r.source == "teacher":
            continue
        with torch.no_grad():
            ids = torch.tensor([[*r.prompt_ids, *r.completion_ids]])
            logprobs = torch.log_softmax(model(ids).logits[0].double(), -1)
        total = 0.0
        for t, token in enumerate(r.completion_ids):
            state = len(r.prompt_ids) + t - 1
            log_ratio = logprobs[state, token].item() - r.rollout_logprobs[t]
            tokens, k1 = tokens + 1, k1 - log_ratio
            k3 += math.exp(log_ratio) - 1 - log_ratio
            total += log_ratio
        ratios.append(math.exp(total))

    learner = learners(tiny, ranks=2, zero_stage=2, micro_batch_tokens=1)
    references = [replace(r, rollout_logprobs=None, source="dataset") for r in rollouts[6:]]
    parts = [Part(drawn, scores, counts, TERMS), Part(references, scores, counts, TERMS)]
    first, second = learner.step(parts, LR).parts
    assert sorted(first.trained) == sorted(r.sample_id for r in drawn)
    assert sorted(second.trained) == sorted(r.sample_id for r in references)
    assert first.sums["ratio_tokens"] == tokens
    assert first.sums["ratio_sequences"] == len(ratios) == 4
    assert first.sums["k1"] == pytest.approx(k1, rel=1e-4)
    assert first.sums["k3"] == pytest.approx(k3, rel=1e-4)
    assert first.sums["ratio"] == pytest.approx(sum(ratios), rel=1e-3)
    assert first.sums["ratio_squared"] == pytest.approx(sum(w**2 for w in ratios), rel=1e-3)
    assert not {"k1", "k3", "ratio", "ratio_tokens"} & second.sums.keys()


def test_no_operator_is_compiled_and_no_stale_lock_is_waited_for(new, tiny, tmp_path):
    """torch creates a lock file while it compiles, which remains if its process is killed."""
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    new(tiny, environment={"TORCH_EXTENSIONS_DIR": str(tmp_path)})
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [lock]


def test_a_learner_on_cpu_cores_uses_onednn_if_faster(learners, local_ray, tiny):
    def asked(rank):
        from actors.cpu_matmul import use_onednn

        return use_onednn.cache_info().currsize

    assert local_ray.get(learners(tiny).ranks[0].__ray_call__.remote(asked)) == 1


def test_published_weights_are_freed_when_the_learner_is_killed(new, local_ray, tiny):
    learner = new(tiny)
    learner.publish()
    path = Path(learner.publish().path)
    kept = [
        str(f.readlink()) for f in path.parent.iterdir() if "seqkd-weights" in str(f.readlink())
    ]
    assert len(kept) == 1, "the previous version is freed"
    process = psutil.Process(int(path.parent.parent.name))
    local_ray.kill(learner.ranks[0])
    process.wait(timeout=60)
    assert not path.exists()
