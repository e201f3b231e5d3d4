"""Every objective against the quantity it claims to estimate, on a fully enumerated language."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from seqkd.objectives import OBJECTIVES, sequence_reverse_kl
from seqkd.types import Counts
from tests.exact.language import (
    LENGTHS,
    SEQUENCES,
    Language,
    finite_difference,
    gradient,
    select,
)

ESTIMATORS = ("reinforce", "reward_to_go", "single_step", "rao_blackwell")
EVERYTHING = range(len(SEQUENCES))


@pytest.fixture(params=[0, 1], ids=["seed0", "seed1"])
def language(request):
    return Language(request.param)


def counts(language: Language, sequences: int = 1) -> Counts:
    theta = language.theta
    return Counts(
        sequences=sequences,
        tokens=language.length(theta).item() * sequences,
        rate=language.rate(theta).item(),
        length=language.length(theta).item(),
    )


def expected_gradient(language: Language, loss_of, samples: int = 1) -> torch.Tensor:
    """E over tuples of ``samples`` independent student sequences of one prompt, by enumeration."""
    q = language.probabilities(language.theta)
    expected = torch.zeros_like(language.theta)
    for rows in product(EVERYTHING, repeat=samples):

        def loss(theta, rows=rows):
            return loss_of(select(language.stats(theta), list(rows), [0] * samples))

        expected += q[list(rows)].prod() * gradient(loss, language.theta)
    return expected


def test_the_language_is_complete(language):
    assert language.probabilities(language.theta).sum().item() == pytest.approx(1, abs=1e-12)
    assert language.teacher_probabilities().sum().item() == pytest.approx(1, abs=1e-12)


def test_rao_blackwell_identity(language):
    """E sum_t r_t = E sum_t KL_t."""
    stats = language.stats(language.theta)
    q = language.probabilities(language.theta)
    exact = (q * stats.reverse_kl.sum(1)).sum()
    assert exact.item() == pytest.approx(language.total(language.theta).item(), abs=1e-12)


@pytest.mark.parametrize("objective", ["total", "rate"])
def test_autograd_of_the_definition_is_its_finite_difference(language, objective):
    function = getattr(language, objective)
    exact = gradient(function, language.theta)
    assert torch.allclose(exact, finite_difference(function, language.theta), atol=1e-8)


@pytest.mark.parametrize("normalization", ["total", "rate"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("baseline", "samples"), [("none", 1), ("leave_one_out", 2)])
def test_unbiased(language, estimator, normalization, baseline, samples):
    exact = gradient(getattr(language, normalization), language.theta)
    found = expected_gradient(
        language,
        lambda s: sequence_reverse_kl(
            s,
            counts(language, samples),
            estimator=estimator,
            baseline=baseline,
            normalization=normalization,
        ),
        samples,
    )
    assert (found - exact).abs().max() <= 1e-9


@pytest.mark.parametrize("estimator", ["single_step", "rao_blackwell"])
def test_minillm_normalization_is_biased(language, estimator):
    exact = gradient(language.total, language.theta)
    found = expected_gradient(
        language,
        lambda s: sequence_reverse_kl(
            s, counts(language), estimator=estimator, baseline="none", normalization="minillm"
        ),
    )
    assert (found - exact).abs().max() > 1e-3


def test_minillm_normalization_is_the_papers(language):
    """R_(t+1) / (T - t - 1), written from the formula, one sequence at a time."""
    theta = language.theta
    stats = language.stats(theta)
    for row, tokens in enumerate(SEQUENCES):
        length, expected = len(tokens), 0.0
        for t in range(length):
            future = sum(stats.reverse_kl[row, u].item() for u in range(t + 1, length))
            future = future / (length - t - 1) if t < length - 1 else 0.0
            expected += stats.reverse_kl[row, t] + future * stats.student_logprob[row, t]
        found = sequence_reverse_kl(
            select(stats, [row], [0]), counts(language), baseline="none", normalization="minillm"
        )
        assert found.item() == pytest.approx(expected.item(), abs=1e-12)


def test_sequence_forward_kl_is_unbiased_on_teacher_samples(language):
    """E_{y~p} of the surrogate's gradient = gradient of KL(p || q) over whole sequences."""
    p = language.teacher_probabilities()

    def definition(theta):
        return (p * (p.log() - language.stats(theta).student_logprob.sum(1))).sum()

    exact = finite_difference(definition, language.theta)
    found = sum(
        p[row]
        * gradient(
            lambda th, row=row: OBJECTIVES["sequence_forward_kl"](
                select(language.stats(th), [row], [0]), counts(language)
            ),
            language.theta,
        )
        for row in EVERYTHING
    )
    assert torch.allclose(found, exact, atol=1e-8)


@pytest.mark.parametrize("kind", ["token_forward_kl", "token_reverse_kl", "sft"])
def test_token_level_objectives_are_means_over_tokens(language, kind):
    """Against sums written with Python floats from the language's tables."""
    theta = language.theta
    stats = language.stats(theta)
    log_q = torch.log_softmax(theta[language.last], -1)
    total = 0.0
    for row, tokens in enumerate(SEQUENCES):
        for t, token in enumerate(tokens):
            q, p = log_q[row, t].exp(), language.log_p[row, t].exp()
            total += {
                "token_forward_kl": sum(p[v] * (p[v] / q[v]).log() for v in range(3)),
                "token_reverse_kl": sum(q[v] * (q[v] / p[v]).log() for v in range(3)),
                "sft": -q[token].log(),
            }[kind].item()
    tokens = LENGTHS.sum().item()
    found = OBJECTIVES[kind](stats, Counts(sequences=len(SEQUENCES), tokens=tokens))
    assert found.item() == pytest.approx(total / tokens, abs=1e-12)


def test_dropping_the_future_is_biased(language):
    """token_reverse_kl on student samples is not the gradient of the sequence-level KL."""
    exact = gradient(language.total, language.theta)
    found = expected_gradient(
        language, lambda s: OBJECTIVES["token_reverse_kl"](s, Counts(sequences=1, tokens=1))
    )
    assert (found - exact).abs().max() > 1e-3


@pytest.mark.parametrize("kind", sorted(OBJECTIVES))
def test_splitting_a_batch_changes_nothing(language, kind):
    """Micro-batches of whole groups add up to the loss and gradient of the batch."""
    rows = [0, 5, 17, 30, 2, 9]
    group = [0, 0, 1, 1, 2, 2]
    count = Counts(sequences=6, tokens=17, rate=0.3, length=2.8)

    def whole(theta):
        return OBJECTIVES[kind](select(language.stats(theta), rows, group), count)

    def split(theta):
        stats = language.stats(theta)
        return sum(
            OBJECTIVES[kind](select(stats, rows[i : i + 2], group[i : i + 2]), count)
            for i in (4, 0, 2)
        )

    assert torch.allclose(gradient(whole, language.theta), gradient(split, language.theta))
    assert torch.allclose(whole(language.theta), split(language.theta))
