"""Estimators of the sequence-level reverse KL compared with the exact gradient by enumeration.
Estimators documented as unbiased agree to 1e-9, and estimators documented as biased differ."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from seqkd.objectives import OBJECTIVES, mixture_weight, sampled_token, sequence_reverse_kl
from seqkd.studies.enumerated import Language, gradient
from tests.exact.expectation import expected_gradient, finite_difference, select

ESTIMATORS = ("reinforce", "reward_to_go", "single_step", "rao_blackwell")
NORMALIZATIONS = ("total", "rate", "neutral")
ALPHA = 0.3

LANGUAGES = {"V3T4": (0, 3, 4), "V3T7": (1, 3, 7), "V4T5": (2, 4, 5)}


@pytest.fixture(params=LANGUAGES)
def language(request):
    return Language(*LANGUAGES[request.param])


@pytest.fixture
def small():
    """Language of 15 sequences, small enough to enumerate pairs."""
    return Language(3, 3, 3)


@pytest.fixture
def smallest():
    """Language of 7 sequences, small enough to enumerate quadruples."""
    return Language(4, 3, 2)


def bias(language, normalization, samples=1, probabilities=None, weighted=False, **options):
    """Return the largest difference between the expected and the exact gradient."""
    theta = language.theta
    exact = gradient(getattr(language, normalization), theta)
    counts = options.pop("counts", None) or language.counts(theta, samples)
    probabilities = language.student(theta) if probabilities is None else probabilities
    subject = Weighted(language) if weighted else language
    expected = expected_gradient(
        subject,
        theta,
        lambda s: sequence_reverse_kl(s, counts, normalization=normalization, **options),
        probabilities,
        samples,
    )
    return (expected - exact).abs().max().item()


class Weighted:
    """A language whose statistics contain the weights of a mixture."""

    def __init__(self, language, alpha=ALPHA):
        self.language, self.sequences, self.alpha = language, language.sequences, alpha

    def stats(self, theta):
        stats = self.language.stats(theta)
        student_total, teacher_total = stats.student_logprob.sum(1), stats.teacher_logprob.sum(1)
        return replace(stats, weight=mixture_weight(student_total, teacher_total, self.alpha))


class Older:
    """A language whose samples come from another student."""

    def __init__(self, language):
        self.language, self.sequences = language, language.sequences
        generator = torch.Generator().manual_seed(9)
        shift = torch.randn(language.theta.shape, generator=generator, dtype=torch.float64)
        self.theta = language.theta + 0.7 * shift
        self.probabilities = language.student(self.theta)

    def stats(self, theta):
        drawn = self.language.stats(self.theta).student_logprob
        return replace(self.language.stats(theta), rollout_logprob=drawn)


# --- the definitions


def test_the_language_is_complete(language):
    assert language.student(language.theta).sum().item() == pytest.approx(1, abs=1e-12)
    assert language.teacher().sum().item() == pytest.approx(1, abs=1e-12)


def test_rao_blackwell_identity(language):
    """E sum_t r_t = E sum_t KL_t."""
    stats = language.stats(language.theta)
    exact = (language.student(language.theta) * stats.reverse_kl.sum(1)).sum()
    assert exact.item() == pytest.approx(language.total(language.theta).item(), abs=1e-12)


@pytest.mark.parametrize("definition", ["total", "rate"])
def test_autograd_of_the_definition_is_its_finite_difference(language, definition):
    function = getattr(language, definition)
    exact = gradient(function, language.theta)
    assert torch.allclose(exact, finite_difference(function, language.theta), atol=1e-8)


def test_neutral_is_a_mean_over_positions_with_constant_weights(language):
    """Its gradient is the finite difference of sum_t w_t E[KL_t; t < L] / P(t < L), where w is the
    survival curve at the student itself, with a sum of 1."""

    def at_position(theta, t):
        rows = [(q, c[t]) for q, c, y in zip(language.student(theta).tolist(),
                language.stats(theta).reverse_kl.tolist(), language.sequences, strict=True)
                if t < len(y)]  # fmt: skip
        return sum(q * cost for q, cost in rows), sum(q for q, _ in rows)

    survival = [at_position(language.theta, t)[1] for t in range(language.horizon)]

    def definition(theta):
        means = (cost / alive for cost, alive in
                 (at_position(theta, t) for t in range(language.horizon)))  # fmt: skip
        return sum(w * m for w, m in zip(survival, means, strict=True)) / sum(survival)

    theta = language.theta
    assert language.neutral(theta).item() == pytest.approx(definition(theta), abs=1e-12)
    exact = gradient(language.neutral, theta)
    assert torch.allclose(exact, finite_difference(definition, theta), atol=1e-8)
    for other in ("total", "rate"):
        assert (exact - gradient(getattr(language, other), theta)).abs().max() > 1e-3


# --- unbiased


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
class TestUnbiased:
    def test_alone(self, language, estimator, normalization):
        assert bias(language, normalization, estimator=estimator, baseline="none") <= 1e-9

    def test_leave_one_out_of_two(self, small, estimator, normalization):
        assert bias(small, normalization, samples=2, estimator=estimator) <= 1e-9

    def test_leave_one_out_of_four(self, smallest, estimator, normalization):
        assert bias(smallest, normalization, samples=4, estimator=estimator) <= 1e-9

    @pytest.mark.parametrize("baseline", ["none", "position_mean"])
    def test_mixture(self, language, estimator, normalization, baseline):
        p, q = language.teacher(), language.student(language.theta)
        mixed = (1 - ALPHA) * q + ALPHA * p
        options = {"estimator": estimator, "baseline": baseline}
        assert bias(language, normalization, 1, mixed, weighted=True, **options) <= 1e-9

    def test_mixture_with_leave_one_out(self, small, estimator, normalization):
        mixed = (1 - ALPHA) * small.student(small.theta) + ALPHA * small.teacher()
        assert bias(small, normalization, 2, mixed, weighted=True, estimator=estimator) <= 1e-9

    @pytest.mark.parametrize(
        "correction", [{"clip_ratio": 0.2}, {"importance_ratio_cap": 1.0}], ids=str
    )
    def test_corrections_on_fresh_samples(self, language, estimator, normalization, correction):
        fresh = Older(language)
        fresh.theta = language.theta
        expected = expected_gradient(
            fresh,
            language.theta,
            lambda s: sequence_reverse_kl(
                s,
                language.counts(language.theta),
                estimator=estimator,
                baseline="none",
                normalization=normalization,
                **correction,
            ),
            language.student(language.theta),
        )
        exact = gradient(getattr(language, normalization), language.theta)
        assert (expected - exact).abs().max() <= 1e-9


@pytest.mark.parametrize("normalization", ["total", "rate"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_position_mean_is_unbiased(language, estimator, normalization):
    """With the costs of another student. Costs need not be correct, only independent of the
    sample."""
    counts, other = language.counts(language.theta), language.counts(-language.theta)
    assert (counts.costs - other.costs).abs().max() > 0.01
    counts = replace(counts, costs=other.costs, survival=other.survival)
    options = {"estimator": estimator, "baseline": "position_mean", "counts": counts}
    assert bias(language, normalization, **options) <= 1e-9


def test_the_bias_of_neutral_with_wrong_estimates(language):
    """With estimates m_t of E[KL_t | t < L], the bias is sum_t (E[KL_t | t < L] - m_t) times the
    gradient of P(t < L), over E[L]. m_t is the rate at positions that no earlier sequence
    reached."""
    theta = language.theta
    counts, other = language.counts(theta), language.counts(-theta)
    reached = language.horizon - 2
    estimates = torch.full((language.horizon,), counts.rate, dtype=torch.float64)
    estimates[:reached] = (other.costs / other.survival)[:reached]
    means = counts.costs / counts.survival

    def definition(at):
        survival = (language.student(at)[:, None] * language.mask).sum(0)
        return language.neutral(at) + ((means - estimates) * survival).sum() / counts.length

    for padding in (0, 1):  # an estimate of 0 sequences is no estimate
        expected = expected_gradient(
            language,
            theta,
            lambda s, padding=padding: sequence_reverse_kl(
                s,
                replace(
                    counts,
                    costs=torch.nn.functional.pad(other.costs[:reached], (0, padding)),
                    survival=torch.nn.functional.pad(other.survival[:reached], (0, padding)),
                ),
                baseline="none",
                normalization="neutral",
            ),
            language.student(theta),
        )
        assert (expected - gradient(definition, theta)).abs().max() <= 1e-9
    assert (expected - gradient(language.neutral, theta)).abs().max() > 1e-3


def test_position_mean_is_the_mean_return(language):
    """With exact costs, the expected return minus baseline is 0 at every position."""
    theta = language.theta
    counts, q = language.counts(theta), language.student(theta)
    for estimator in ("reward_to_go", "rao_blackwell"):
        for discount in (1.0, 0.8):
            stats = language.stats(theta)
            # d loss / d log q(y_t) is the factor of log q(y_t).
            logprob = stats.student_logprob.detach().requires_grad_()
            loss = sequence_reverse_kl(
                replace(stats, student_logprob=logprob, weight=q),
                counts,
                estimator=estimator,
                baseline="position_mean",
                normalization="rate",
                discount=discount,
            )
            (returns,) = torch.autograd.grad(loss, logprob)
            assert returns.sum(0).abs().max() <= 1e-12


def test_position_mean_of_reinforce_is_the_mean_cost_of_all_sequences(language):
    """Every token is multiplied by the cost of its whole sequence, so the baseline is the same at
    every position, although fewer sequences have the later ones."""
    theta = language.theta
    q, mask = language.student(theta), language.stats(theta).loss_mask
    factors = {}
    for baseline in ("none", "position_mean"):
        stats = language.stats(theta)
        logprob = stats.student_logprob.detach().requires_grad_()
        loss = sequence_reverse_kl(
            replace(stats, student_logprob=logprob, weight=q),
            language.counts(theta),
            estimator="reinforce",
            baseline=baseline,
            normalization="total",
        )
        (factors[baseline],) = torch.autograd.grad(loss, logprob)
    subtracted = (factors["none"] - factors["position_mean"])[mask]
    weights = (q[:, None] * mask)[mask] / language.counts(theta).sequences
    expected = language.total(theta) * weights
    assert torch.allclose(subtracted, expected, atol=1e-12)


def test_mixture_weights_are_bounded_and_average_to_one(language):
    stats = language.stats(language.theta)
    p, q = language.teacher(), language.student(language.theta)
    weight = mixture_weight(stats.student_logprob.sum(1), stats.teacher_logprob.sum(1), ALPHA)
    assert weight.max() <= 1 / (1 - ALPHA)
    assert (((1 - ALPHA) * q + ALPHA * p) * weight).sum().item() == pytest.approx(1, abs=1e-12)


def test_mixture_weights_of_very_different_models_are_finite():
    weight = mixture_weight(torch.tensor([-5000.0, -1.0]), torch.tensor([-1.0, -5000.0]), 0.2)
    assert weight.tolist() == pytest.approx([0.0, 1.25])


# --- biased


@pytest.mark.parametrize(
    "options",
    [
        {"normalization": "minillm", "estimator": "single_step"},
        {"normalization": "minillm", "estimator": "rao_blackwell"},
        {"normalization": "total", "future_weight": 0.5},
        {"normalization": "rate", "future_weight": 0.5},
        {"normalization": "total", "discount": 0.7},
        {"normalization": "rate", "discount": 0.7},
        {"normalization": "neutral", "discount": 0.7},
        {"normalization": "total", "stop": "graded"},
        {"normalization": "rate", "stop": "graded"},
        {"normalization": "neutral", "stop": "graded"},
    ],
    ids=str,
)
def test_biased(language, options):
    definition = options["normalization"].replace("minillm", "total")
    exact = gradient(getattr(language, definition), language.theta)
    expected = expected_gradient(
        language,
        language.theta,
        lambda s: sequence_reverse_kl(
            s, language.counts(language.theta), baseline="none", **options
        ),
        language.student(language.theta),
    )
    assert (expected - exact).abs().max() > 1e-3


@pytest.mark.parametrize("estimator", ["reward_to_go", "single_step", "rao_blackwell"])
@pytest.mark.parametrize("option", [{"future_weight": 0.0}, {"discount": 0.0}], ids=str)
def test_without_future_costs_the_gradient_is_the_token_level_gradient(language, estimator, option):
    """The token-level gradient is E_q sum_t grad KL_t with a fixed distribution of the states."""
    theta, q = language.theta, language.student(language.theta)
    exact = gradient(lambda th: (q * language.stats(th).reverse_kl.sum(1)).sum(), theta)
    expected = expected_gradient(
        language,
        theta,
        lambda s: sequence_reverse_kl(
            s,
            language.counts(theta),
            estimator=estimator,
            baseline="none",
            normalization="total",
            **option,
        ),
        q,
    )
    assert (expected - exact).abs().max() <= 1e-9
    assert (expected - gradient(language.total, theta)).abs().max() > 1e-3


def test_discount_and_future_weight_match_the_formula(language):
    """Compare with future_weight times sum_{u>t} discount^(u-t) KL_u, one sequence at a time."""
    stats, theta = language.stats(language.theta), language.theta
    for row in range(0, len(language.sequences), 7):
        exact = 0.0
        for t in range(len(language.sequences[row])):
            ahead = range(t + 1, len(language.sequences[row]))
            future = sum(0.8 ** (u - t) * stats.reverse_kl[row, u].item() for u in ahead)
            exact += stats.reverse_kl[row, t] + 0.6 * future * stats.student_logprob[row, t]
        loss = sequence_reverse_kl(
            select(stats, [row], [0]),
            language.counts(theta),
            baseline="none",
            normalization="total",
            future_weight=0.6,
            discount=0.8,
        )
        assert loss.item() == pytest.approx(exact.item(), abs=1e-12)


def test_minillm_normalization_matches_the_paper(language):
    """Compare with R_(t+1) / (T - t - 1), one sequence at a time."""
    stats = language.stats(language.theta)
    for row, tokens in enumerate(language.sequences):
        length, exact = len(tokens), 0.0
        for t in range(length):
            future = sum(stats.reverse_kl[row, u].item() for u in range(t + 1, length))
            future = future / (length - t - 1) if t < length - 1 else 0.0
            exact += stats.reverse_kl[row, t] + future * stats.student_logprob[row, t]
        loss = sequence_reverse_kl(
            select(stats, [row], [0]),
            language.counts(language.theta),
            baseline="none",
            normalization="minillm",
        )
        assert loss.item() == pytest.approx(exact.item(), abs=1e-12)


# --- sampled tokens, and samples of an older student


def test_the_expectation_of_sampled_token_is_the_token_level_gradient(language):
    theta, q = language.theta, language.student(language.theta)
    counts = replace(language.counts(theta), tokens=1.0)
    exact = gradient(lambda th: (q * language.stats(th).reverse_kl.sum(1)).sum(), theta)
    expected = expected_gradient(language, theta, lambda s: sampled_token(s, counts), q)
    assert (expected - exact).abs().max() <= 1e-9
    assert (expected - gradient(language.total, theta)).abs().max() > 1e-3
    mixed = (1 - ALPHA) * q + ALPHA * language.teacher()
    weighted = Weighted(language)
    expected = expected_gradient(weighted, theta, lambda s: sampled_token(s, counts), mixed)
    assert (expected - exact).abs().max() <= 1e-9


def test_the_token_ratio_corrects_the_distribution_of_each_token(language):
    """Without truncation the expectation is the token-level gradient at the states of the older
    student. It differs with truncation at 1, with clipping, and without correction."""
    older, theta = Older(language), language.theta
    counts = replace(language.counts(theta), tokens=1.0)
    exact = gradient(
        lambda th: (older.probabilities * language.stats(th).reverse_kl.sum(1)).sum(), theta
    )

    def expected(**options):
        return expected_gradient(
            older, theta, lambda s: sampled_token(s, counts, **options), older.probabilities
        )

    assert (expected(importance_ratio_cap=1e9) - exact).abs().max() <= 1e-9
    for options in ({}, {"importance_ratio_cap": 1.0}, {"clip_ratio": 0.2}):
        assert (expected(**options) - exact).abs().max() > 1e-3, options


def test_truncation_and_clipping_match_their_formulas(language):
    older, theta = Older(language), language.theta
    stats = older.stats(theta)
    ratio = (stats.student_logprob - stats.rollout_logprob).exp()
    cost = (stats.student_logprob - stats.teacher_logprob).detach()
    counts = replace(language.counts(theta), tokens=1.0)
    for row in range(0, len(language.sequences), 5):
        one, length = select(stats, [row], [0]), len(language.sequences[row])
        truncated = clipped = 0.0
        for t in range(length):
            w, r = ratio[row, t].item(), cost[row, t].item()
            truncated += min(w, 1.1) * r * stats.student_logprob[row, t].item()
            clipped += max(w * r, min(max(w, 0.9), 1.1) * r)
        assert sampled_token(one, counts, importance_ratio_cap=1.1).item() == pytest.approx(
            truncated
        )
        assert sampled_token(one, counts, clip_ratio=0.1).item() == pytest.approx(clipped)


def test_corrections_of_the_choice_alone_use_the_ratio_of_the_token(language):
    """With stop graded, the factor of log q(y_t | not end) is the return times the truncated or
    clipped ratio of the whole token."""
    older = Older(language)
    stats, counts = older.stats(language.theta), language.counts(language.theta)
    ratio = (stats.student_logprob - stats.rollout_logprob).exp()

    def factors(**options):
        content = stats.content_logprob.clone().requires_grad_()
        loss = sequence_reverse_kl(
            replace(stats, content_logprob=content), counts, baseline="none",
            normalization="neutral", stop="graded", **options
        )  # fmt: skip
        return torch.autograd.grad(loss, content)[0]

    plain = factors()
    assert plain.abs().max() > 0.01
    capped = factors(importance_ratio_cap=1.1)
    assert torch.allclose(capped, plain * ratio.clamp(max=1.1), atol=1e-12)
    clipped = factors(clip_ratio=0.1)
    free = torch.where(plain > 0, ratio > 0.9, ratio < 1.1)
    assert torch.allclose(clipped, plain * ratio * free, atol=1e-12)


def test_token_level_reverse_kl_on_student_samples_is_biased(language):
    theta = language.theta
    exact = gradient(language.total, theta)

    def loss(stats):
        counts = replace(language.counts(theta), tokens=1.0)
        return OBJECTIVES["token_reverse_kl"](replace(stats, divergence=weigh(stats)), counts)

    def weigh(stats):
        return stats.reverse_kl * stats.weight[:, None]

    expected = expected_gradient(language, theta, loss, language.student(theta))
    assert (expected - exact).abs().max() > 1e-3
