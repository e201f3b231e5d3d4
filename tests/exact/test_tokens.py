"""Token-level divergences and likelihoods compared with sums of Python floats, and properties of
all objectives."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from seqkd.objectives import DIVERGENCES, OBJECTIVES
from seqkd.objectives.divergences import graded_kl
from seqkd.studies.enumerated import Language, gradient
from seqkd.types import Counts
from tests.exact.expectation import expected_gradient, finite_difference, select


@pytest.fixture
def language():
    return Language(0, 3, 4)


def kl(a, b):
    return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))


def mix(share, a, b):
    return [share * x + (1 - share) * y for x, y in zip(a, b, strict=True)]


DEFINITIONS = {
    "token_forward_kl": lambda q, p, _: kl(p, q),
    "token_reverse_kl": lambda q, p, _: kl(q, p),
    "gjsd": lambda q, p, b: b * kl(p, mix(b, p, q)) + (1 - b) * kl(q, mix(b, p, q)),
    "skew_kl": lambda q, p, s: kl(p, mix(s, p, q)),
    "skew_reverse_kl": lambda q, p, s: kl(q, mix(s, q, p)),
    "total_variation": lambda q, p, _: sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2,
}
COEFFICIENTS = {"gjsd": (0.1, 0.5, 0.9), "skew_kl": (0.1, 0.6), "skew_reverse_kl": (0.1, 0.6)}
CASES = [(kind, c) for kind in DEFINITIONS for c in COEFFICIENTS.get(kind, (None,))]


def options(coefficient):
    return () if coefficient is None else (coefficient,)


def softmax(logits):
    exps = [math.exp(x) for x in logits]
    return [x / sum(exps) for x in exps]


def test_every_divergence_has_a_definition():
    assert DEFINITIONS.keys() == DIVERGENCES.keys()


@pytest.mark.parametrize(("kind", "coefficient"), CASES)
def test_value_and_gradient_match_the_definitions(kind, coefficient):
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        logits, teacher = (
            torch.randn(4, generator=generator, dtype=torch.float64) * 2 for _ in range(2)
        )
        p = softmax(teacher.tolist())

        def definition(x, p=p):
            value = DEFINITIONS[kind](softmax(x.tolist()), p, coefficient)
            return torch.tensor(value, dtype=torch.float64)

        def divergence(x, teacher=teacher):
            log_q, log_p = torch.log_softmax(x, -1), torch.log_softmax(teacher, -1)
            return DIVERGENCES[kind](log_q, log_p, *options(coefficient))

        assert divergence(logits).item() == pytest.approx(definition(logits).item(), abs=1e-12)
        assert divergence(logits) > 0
        exact = finite_difference(definition, logits)
        assert torch.allclose(gradient(divergence, logits), exact, atol=1e-7)


@pytest.mark.parametrize(("kind", "coefficient"), CASES)
def test_equal_distributions_have_no_divergence_and_no_gradient(kind, coefficient):
    logits = torch.randn(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log_p = torch.log_softmax(logits, -1)

    def divergence(x):
        return DIVERGENCES[kind](torch.log_softmax(x, -1), log_p, *options(coefficient))

    assert abs(divergence(logits).item()) <= 1e-12
    assert gradient(divergence, logits).abs().max() <= 1e-12


def split(probabilities, ends):
    """Return [P(end), P(not end)], and the distributions over end tokens and over other tokens."""
    parts = [[p for v, p in enumerate(probabilities) if (v in ends) == e] for e in (True, False)]
    return [sum(part) for part in parts], *([p / sum(part) for p in part] for part in parts)


@pytest.mark.parametrize("ends", [(0,), (1, 3), (4, 0, 2)])
def test_graded_kl_and_its_gradient_match_the_definition(ends):
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        logits, teacher = (
            torch.randn(5, generator=generator, dtype=torch.float64) * 2 for _ in range(2)
        )
        stop_p, end_p, content_p = split(softmax(teacher.tolist()), ends)
        (h, rest), *_ = split(softmax(logits.tolist()), ends)  # constants of the gradient

        def definition(x, stop_p=stop_p, end_p=end_p, content_p=content_p, h=h, rest=rest):
            stop, end, content = split(softmax(x.tolist()), ends)
            value = kl(stop_p, stop) + rest * kl(content, content_p) + h * kl(end, end_p)
            return torch.tensor(value, dtype=torch.float64)

        def divergence(x, teacher=teacher):
            log_q, log_p = torch.log_softmax(x, -1), torch.log_softmax(teacher, -1)
            return graded_kl(log_q, log_p, torch.tensor(ends))

        assert divergence(logits).item() == pytest.approx(definition(logits).item(), abs=1e-12)
        exact = finite_difference(definition, logits)
        assert torch.allclose(gradient(divergence, logits), exact, atol=1e-7)
        more_ends = torch.zeros(5, dtype=torch.float64)
        more_ends[list(ends)] = 1.0  # the direction of the log-odds of the end
        slope = gradient(divergence, logits) @ more_ends
        assert slope.item() == pytest.approx(h - stop_p[0], abs=1e-12)
        assert abs(divergence(teacher).item()) <= 1e-12


def test_graded_kl_is_finite_for_a_certain_end():
    """In float32 the log-prob of such an end is 0."""
    ends = torch.tensor([0])
    for sign in (60.0, -60.0):
        logits = torch.tensor([sign, 1.0, -1.0], requires_grad=True)
        log_q = torch.log_softmax(logits, -1)
        log_p = torch.log_softmax(torch.tensor([0.5, 0.0, 2.0]), -1)
        value = graded_kl(log_q, log_p, ends)
        value.backward()
        assert 1 < value.item() < 60
        assert logits.grad.isfinite().all()
        assert logits.grad[0].abs() > 0.1


def test_generalized_jensen_shannon_tends_to_both_kls():
    log_q, log_p = torch.log_softmax(
        torch.randn(2, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64), -1
    )
    gjsd, tiny = DIVERGENCES["gjsd"], 1e-7
    forward, reverse = (DIVERGENCES[f"token_{w}_kl"](log_q, log_p) for w in ("forward", "reverse"))
    assert (gjsd(log_q, log_p, tiny) / tiny).item() == pytest.approx(forward.item(), rel=1e-5)
    assert (gjsd(log_q, log_p, 1 - tiny) / tiny).item() == pytest.approx(reverse.item(), rel=1e-5)
    assert gjsd(log_q, log_p, 0.5) == gjsd(log_p, log_q, 0.5)
    assert gjsd(log_q, log_p, 0.5) < math.log(2)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_token_level_objectives_are_means_over_tokens(language, kind):
    (coefficient, *_) = COEFFICIENTS.get(kind, (None,))
    theta = language.theta
    log_q = language.log_q(theta)
    total = sum(
        DEFINITIONS[kind](
            log_q[row, t].exp().tolist(), language.log_p[row, t].exp().tolist(), coefficient
        )
        for row, tokens in enumerate(language.sequences)
        for t in range(len(tokens))
    )
    values = DIVERGENCES[kind](log_q, language.log_p, *options(coefficient))
    stats = replace(language.stats(theta), divergence=values)
    tokens = language.lengths.sum().item()
    loss = OBJECTIVES[kind](stats, Counts(sequences=len(language.sequences), tokens=tokens))
    assert loss.item() == pytest.approx(total / tokens, abs=1e-12)


def test_sft_is_the_mean_negative_log_likelihood(language):
    log_q = language.log_q(language.theta)
    total = -sum(
        log_q[row, t, token].item()
        for row, tokens in enumerate(language.sequences)
        for t, token in enumerate(tokens)
    )
    tokens = language.lengths.sum().item()
    loss = OBJECTIVES["sft"](language.stats(language.theta), Counts(1, tokens))
    assert loss.item() == pytest.approx(total / tokens, abs=1e-12)


def test_sequence_forward_kl_is_unbiased_on_teacher_samples(language):
    """The expectation over y ~ p of the surrogate's gradient is the gradient of KL(p || q) of whole
    sequences."""
    p = language.teacher()

    def definition(theta):
        return (p * (p.log() - language.student(theta).log())).sum()

    exact = finite_difference(definition, language.theta)
    rows = range(len(language.sequences))
    expected = sum(
        p[row]
        * gradient(
            lambda th, row=row: OBJECTIVES["sequence_forward_kl"](
                select(language.stats(th), [row], [0]), language.counts(language.theta)
            ),
            language.theta,
        )
        for row in rows
    )
    assert torch.allclose(expected, exact, atol=1e-8)


def test_forward_and_reverse_together(language):
    """The sum of the gradients of two terms with separate samples is the gradient of the sum of
    both KLs."""
    p, theta = language.teacher(), language.theta

    def both(at):
        forward = (p * (p.log() - language.student(at).log())).sum()
        return 0.3 * forward + 0.7 * language.total(at)

    counts = language.counts(theta)
    reverse = expected_gradient(
        language,
        theta,
        lambda s: OBJECTIVES["sequence_reverse_kl"](
            s, counts, baseline="none", normalization="total"
        ),
        language.student(theta),
    )
    forward = gradient(
        lambda at: -(p[:, None] * language.stats(at).student_logprob * language.mask).sum(), theta
    )
    assert (0.3 * forward + 0.7 * reverse - gradient(both, theta)).abs().max() <= 1e-9


@pytest.mark.parametrize("kind", sorted(OBJECTIVES))
def test_splitting_a_batch_changes_nothing(language, kind):
    """Losses and gradients of micro-batches of complete groups add up to those of the batch."""
    rows, group = [0, 5, 17, 30, 2, 9], [0, 0, 1, 1, 2, 2]
    count = Counts(sequences=6, tokens=17, rate=0.3, length=2.8)

    def stats(theta):
        log_q = language.log_q(theta)
        language_stats = language.stats(theta)
        if kind in DIVERGENCES:
            (coefficient, *_) = COEFFICIENTS.get(kind, (None,))
            values = DIVERGENCES[kind](log_q, language.log_p, *options(coefficient))
            language_stats = replace(language_stats, divergence=values)
        return language_stats

    def whole(theta):
        return OBJECTIVES[kind](select(stats(theta), rows, group), count)

    def split(theta):
        return sum(
            OBJECTIVES[kind](select(stats(theta), rows[i : i + 2], group[i : i + 2]), count)
            for i in (4, 0, 2)
        )

    assert torch.allclose(gradient(whole, language.theta), gradient(split, language.theta))
    assert torch.allclose(whole(language.theta), split(language.theta))
