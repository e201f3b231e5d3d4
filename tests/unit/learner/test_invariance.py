"""Loss and gradient of a real model do not depend on padding, on order or on the division into
micro-batches. All objectives are finite for very long, very short and identical sequences."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from seqkd.config.phases import TermConfig
from seqkd.learner import batching
from seqkd.learner.student import StudentModel, as_token_stats, last_hidden
from seqkd.models.loading import load_causal_lm
from seqkd.models.output_head import head_of
from seqkd.objectives import DIVERGENCES, OBJECTIVES
from seqkd.types import Counts, Divergence, EndStat, Rollout, TeacherScore, TokenStats

COEFFICIENT = {"gjsd": 0.5, "skew_kl": 0.1, "skew_reverse_kl": 0.1}
SEQUENCE = "sequence_reverse_kl"
CASES = [
    *((kind, {}) for kind in OBJECTIVES if kind != SEQUENCE),
    *(
        (SEQUENCE, {"estimator": e, "normalization": "rate"})
        for e in ("reinforce", "reward_to_go", "single_step")
    ),
    *((SEQUENCE, {"normalization": n}) for n in ("rate", "total", "minillm", "neutral")),
    *((SEQUENCE, {"normalization": n, "stop": "graded"}) for n in ("minillm", "neutral")),
    *((SEQUENCE, {"baseline": b, "normalization": "rate"}) for b in ("none", "position_mean")),
    (SEQUENCE, {"discount": 0.9}),
    (SEQUENCE, {"future_weight": 0.5}),
    (SEQUENCE, {"clip_ratio": 0.2}),
    (SEQUENCE, {"importance_ratio_cap": 2.0}),
    ("sampled_token", {"clip_ratio": 0.2}),
]
COUNTS = Counts(6, 40, 0.7, 6.5, torch.tensor([3.0, 2, 1]), torch.tensor([4.0, 3, 1]))
ALONE, SHARED = batching.Layout(1), batching.Layout(1, sharing=10**9)
ENDS = (5, 9)
"""Tokens that end a completion: two of the completions have one."""
NAMES = (
    *("student_logprob", "teacher_logprob", "reverse_kl", "forward_kl"),
    *(EndStat(name, ENDS) for name in ("content_logprob", "graded_kl")),
)


@pytest.fixture(scope="module")
def models(tiny):
    student = StudentModel(load_causal_lm(tiny["student"], "float32", "model"))
    return student, load_causal_lm(tiny["teacher"], "float32", "model")


@pytest.fixture(scope="module")
def data(models):
    """Three prompts with two samples: one of one token, two with an end token, two equal."""
    _, teacher = models
    generator = torch.Generator().manual_seed(0)
    rollouts, scores = [], {}
    lengths = {"a": (1, 9), "b": (12, 4), "c": (7, 7)}
    for prompt_id, (first, second) in lengths.items():
        prompt = torch.randint(5, 260, (first + 2,), generator=generator).tolist()
        alike = torch.randint(5, 260, (7,), generator=generator).tolist()
        for index, length in enumerate((first, second)):
            ids = torch.randint(5, 260, (length,), generator=generator).tolist()
            ids = alike if prompt_id == "c" else ids
            if prompt_id == "b":
                ids[-1] = ENDS[index]
            logprobs = tuple(-torch.rand(length, generator=generator) * 6)
            r = Rollout(
                prompt_id,
                f"{prompt_id}/{index}",
                tuple(prompt),
                tuple(ids),
                tuple(map(float, logprobs)),
                "student",
                0,
                "length",
            )
            fed = torch.tensor([batching.fed_tokens(r)])
            with torch.no_grad():
                states = last_hidden(teacher, fed, torch.ones_like(fed))[0, batching.state_span(r)]
            rollouts.append(r)
            scores[r.sample_id] = TeacherScore(r.sample_id, hidden=states)
    return rollouts, scores


def outcome(models, batches, kind, options):
    """Compute the loss and the gradients of all parameters, summed over micro-batches."""
    student, teacher = models
    student.zero_grad()
    wanted = Divergence(kind, COEFFICIENT.get(kind)) if kind in DIVERGENCES else None
    total = 0.0
    for batch in batches:

        def objective(stats, batch=batch):
            return OBJECTIVES[kind](as_token_stats(batch, stats, wanted), COUNTS, **options)

        names, head = (*NAMES, *([wanted] if wanted else [])), head_of(teacher)
        loss, _ = student(batch, names, head, objective)
        loss.backward()
        total += loss.item()
    return total, [p.grad.clone() for p in student.parameters()]


def padded(batch, left, right):
    """Add ``left`` and ``right`` padding positions to S, and ``right`` padding positions to T."""
    pad = torch.nn.functional.pad
    return replace(
        batch,
        input_ids=pad(batch.input_ids, (left, right), value=7),
        attention_mask=pad(batch.attention_mask, (left, right)),
        state_index=(pad(batch.state_index, (0, right)) + left),
        target_ids=pad(batch.target_ids, (0, right), value=3),
        loss_mask=pad(batch.loss_mask, (0, right)),
        rollout_logprobs=pad(batch.rollout_logprobs, (0, right), value=-4.0),
        **{
            name: pad(getattr(batch, name), (left, right))
            for name in ("position_ids", "segment")
            if batch.segment is not None
        },
    )


@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
def test_padding_order_and_division_change_nothing(models, data, kind, options):
    rollouts, scores = data

    def pack(some, layout=ALONE):
        return batching.pack(some, scores, rollouts[0], layout)

    whole = pack(rollouts)
    loss, gradients = outcome(models, [whole], kind, options)
    assert max(g.abs().max() for g in gradients) > 1e-3
    mixed = [rollouts[i] for i in (3, 0, 4, 1, 5, 2)]
    others = {
        "right": [padded(whole, 0, 5)],
        "left": [padded(whole, 4, 0)],
        "order": [pack(mixed)],
        "division": [pack(rollouts[i : i + 2]) for i in (4, 0, 2)],
        "an empty one": [whole, pack([])],
        "a shared prompt": [pack(rollouts, SHARED)],
        "shared prompts in another order": [pack(mixed, SHARED)],
        "shared prompts, padded": [padded(pack(rollouts, SHARED), 0, 5)],
        "shared prompts, divided": [pack(rollouts[i : i + 2], SHARED) for i in (4, 0, 2)],
    }
    for name, batches in others.items():
        again, others_gradients = outcome(models, batches, kind, options)
        assert again == pytest.approx(loss, rel=1e-5, abs=1e-5), name
        for a, b in zip(gradients, others_gradients, strict=True):
            # Left padding shifts the rotary angles. The rounding error differs by processor.
            assert (a - b).abs().max() <= 3e-5 * max(1.0, a.abs().max()), name


@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
def test_a_completion_of_8192_tokens_is_finite(kind, options):
    generator = torch.Generator().manual_seed(0)
    size = (2, 8192)

    def drawn():
        return (torch.rand(size, generator=generator) * 12).requires_grad_()

    names = "student_logprob", "reverse_kl", "divergence", "content_logprob", "graded_kl"
    leaves = {name: drawn() for name in names}
    stats = TokenStats(
        loss_mask=torch.ones(size, dtype=torch.bool),
        group=torch.tensor([0, 0]),
        student_logprob=-leaves["student_logprob"],
        teacher_logprob=-drawn().detach(),
        reverse_kl=leaves["reverse_kl"],
        divergence=leaves["divergence"],
        content_logprob=-leaves["content_logprob"],
        graded_kl=leaves["graded_kl"],
        rollout_logprob=-drawn().detach(),
    )
    loss = OBJECTIVES[kind](stats, COUNTS, **options)
    loss.backward()
    assert loss.isfinite()
    gradients = [g.grad for g in leaves.values() if g.grad is not None]
    assert gradients
    assert all(g.isfinite().all() for g in gradients)


def test_all_cases_are_valid_configurations():
    for kind, options in CASES:
        objective = {"kind": kind, **options}
        for sampler in ("student", "teacher", "dataset"):
            try:
                assert TermConfig.model_validate({"sampler": sampler, "objective": objective})
                break
            except ValueError:
                continue
        else:
            raise AssertionError(objective)
    assert {kind for kind, _ in CASES} == set(OBJECTIVES)
