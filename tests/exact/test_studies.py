"""Correctness of the studies' measurements."""

from __future__ import annotations

import pytest
import torch

from seqkd.studies import gaussians, gradient_variance, linear
from seqkd.studies.enumerated import Language
from seqkd.studies.estimators import ROWS, TRAINED, describe, quality, train, warm_up


@pytest.fixture(scope="module")
def qualities():
    language = Language(0, vocabulary=3, horizon=3)
    return {row.name: quality(language, language.theta, row) for row in ROWS}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_documented_bias_is_correct(qualities, row):
    q = qualities[row.name]
    if row.unbiased:
        assert q.bias <= 1e-9
        assert q.cosine == pytest.approx(1, abs=1e-9)
    else:
        assert q.bias > 1e-3
        assert q.cosine < 1


def test_the_order_of_variances(qualities):
    order = [
        "reinforce",
        "reward_to_go",
        "single_step",
        "rao_blackwell",
        "rao_blackwell, leave-one-out of 4",
        "token_reverse_kl",
    ]
    variances = [qualities[name].variance for name in order]
    assert variances == sorted(variances, reverse=True)
    assert qualities["sampled_token"].variance > qualities["token_reverse_kl"].variance


def test_the_variance_matches_sampled_gradients(qualities):
    """Compare with a simulation that does not use the factorization of the computation."""
    from seqkd.objectives import sequence_reverse_kl
    from seqkd.studies.enumerated import gradient
    from tests.exact.expectation import select

    language = Language(0, vocabulary=3, horizon=3)
    theta, counts = language.theta, language.counts(language.theta, 2)
    generator = torch.Generator().manual_seed(0)
    q = language.student(theta)
    gradients = []
    for rows in torch.multinomial(q, 2 * 3000, replacement=True, generator=generator).split(2):
        gradients.append(
            gradient(
                lambda at, rows=rows: sequence_reverse_kl(
                    select(language.stats(at), rows, [0, 0]), counts, normalization="total"
                ),
                theta,
            ).flatten()
        )
    variance = torch.stack(gradients).var(0).sum().item() * 2
    assert variance == pytest.approx(
        qualities["rao_blackwell, leave-one-out of 2"].variance, rel=0.08
    )


def test_each_objective_trains_to_its_own_optimum():
    language = Language(2, vocabulary=3, horizon=5)
    start = warm_up(language)
    outcomes = {name: describe(language, train(language, TRAINED[name], start))
               for name in ("total", "rate", "token level")}  # fmt: skip
    assert min(outcomes, key=lambda name: outcomes[name].total) == "total"
    assert min(outcomes, key=lambda name: outcomes[name].rate) == "rate"
    assert outcomes["total"].length < outcomes["rate"].length


def test_a_sketch_keeps_the_norm_of_a_gradient():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(300, 300), torch.nn.Linear(300, 2))
    loss = model(torch.randn(8, 300)).square().sum()
    exact = sum(
        g.square().sum() for g in torch.autograd.grad(loss, model.parameters(), retain_graph=True)
    )
    sketched = gradient_variance.Sketch(model, 0).project(loss).square().sum()
    assert sketched.item() == pytest.approx(exact.item(), rel=0.05)


def test_forward_kl_has_the_teachers_moments_and_reverse_kl_a_mode():
    means = torch.tensor([[-4.0], [4.0]], dtype=torch.float64)
    fits = {k: gaussians.fit(k, means, torch.zeros_like(means)) for k in gaussians.DIVERGENCES}
    mean, deviation = gaussians.moments()
    for end, scale in zip(fits["forward"].means, fits["forward"].scales, strict=True):
        assert (end.item(), scale.item()) == pytest.approx((mean, deviation), abs=1e-2)
    (modes,) = gaussians.TEACHER[0]
    assert fits["reverse"].means[:, 0].tolist() == pytest.approx(modes.tolist(), abs=0.2)


def test_two_gaussians_become_the_teacher():
    means = torch.tensor([[-1.0, 1.0]], dtype=torch.float64)
    for kind in gaussians.DIVERGENCES:
        fit = gaussians.fit(kind, means, torch.zeros_like(means))
        assert fit.divergence[-1] < 1e-6
        assert fit.shares[0].tolist() == pytest.approx([0.6, 0.4], abs=1e-2)
        steps = int(fit.steps_to_converge())
        assert fit.divergence[steps:, 0].max() <= 0.01 + 1e-6 < fit.divergence[steps - 1, 0] + 1e-6


@pytest.mark.parametrize("rank", [1, 16])
def test_a_linear_teacher_has_its_rank_and_scale(rank):
    weight = linear.teacher(rank, torch.Generator().manual_seed(0))
    assert torch.linalg.matrix_rank(weight) == rank
    logits = torch.randn(4096, 64, generator=torch.Generator().manual_seed(1)) @ weight.T
    assert logits.square().mean().sqrt().item() == pytest.approx(3.0, rel=0.1)


@pytest.mark.parametrize("kind", linear.DIVERGENCES)
def test_a_linear_student_learns_its_teacher(kind):
    path = linear.train(kind, rank=4, seed=0, optimizer="adam", lr=0.01, steps=300)
    assert path.distribution[-1] < 0.2 * path.distribution[0]
    assert path.weights[-1] < 0.3 * path.weights[0]
