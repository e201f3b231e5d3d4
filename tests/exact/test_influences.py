"""Discounted returns, and the end of a completion graded apart, compared with their definition: the
influence of every decision on the cost at every later position.

The student gets separate parameters for the decision to end (h) and for the choice of the token (c)
at every position. The derivative of the cost at position t by the parameters of position u is then
the influence of a decision t - u tokens earlier.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch

from seqkd.objectives import sequence_reverse_kl
from seqkd.studies.enumerated import Language, gradient
from tests.exact.expectation import expected_gradient

LANGUAGES = {"one end": (0, 3, 4), "two ends": (1, 4, 4, (0, 2)), "other end": (2, 3, 5, (1,))}
STOP, CHOICE = 0, 1


@pytest.fixture(params=LANGUAGES)
def language(request):
    return Language(*LANGUAGES[request.param])


def log_probs(language, copies):
    """Return [N, T, V] log-probs of a student with parameters ``copies``, [T, 2, V + 1, V]."""
    ends = language.ends.tolist()
    others = [v for v in range(language.vocabulary) if v not in ends]
    result = torch.zeros(len(language.sequences), language.horizon, language.vocabulary).double()
    for row, t in product(range(len(language.sequences)), range(language.horizon)):
        stop, choice = (torch.softmax(copies[t, k, language.last[row, t]], -1) for k in (0, 1))
        for part in (ends, others):
            q = stop[part].sum() * choice[part] / choice[part].sum()
            result = result.index_put(
                (torch.tensor(row), torch.tensor(t), torch.tensor(part)), q.log()
            )
    return result


def costs_by_position(language, copies, normalization):
    """Return the [T] terms of the objective, whose sum is the objective up to constant factors."""
    log_q = log_probs(language, copies)
    probability = language._sampled(log_q).sum(1).exp()[:, None] * language.mask
    divergence = (log_q.exp() * (log_q - language.log_p)).sum(-1)
    costs, survival = (probability * divergence).sum(0), probability.sum(0)
    length = survival.sum().detach()
    if normalization == "total":
        return costs
    if normalization == "rate":  # quotient rule: d(A / L) = (dA - J dL) / L
        return (costs - (costs.sum() / survival.sum()).detach() * survival) / length
    return survival.detach() / length * costs / survival


def graded_cost(language, theta):
    """Return E_q of sum_t [KL(h' || h) + (1 - h) KL(c || c') + h KL(e || e')], where only h and the
    divergences, not the factors 1 - h and h, nor the distribution of the states, depend on
    ``theta``."""
    total, ends = 0.0, language.ends.tolist()
    others = [v for v in range(language.vocabulary) if v not in ends]
    q = language.student(language.theta)
    at, then = language.log_q(theta).exp(), language.log_q(language.theta).exp()
    p = language.log_p.exp()
    for row, t in language.mask.nonzero().tolist():
        value = 0.0
        for part in (ends, others):
            new, target = at[row, t, part], p[row, t, part]
            a, b = new.sum(), target.sum()
            value = value + b * (b / a).log()
            within = (new / a * ((new / a) / (target / b)).log()).sum()
            value = value + then[row, t, part].sum() * within
        total = total + q[row] * value
    return total


def definition(language, normalization, discount, future_weight, stop):
    """Return the expected gradient."""
    theta, T = language.theta, language.horizon
    copies = theta.expand(T, 2, *theta.shape).clone()
    by_copy = torch.autograd.functional.jacobian(
        lambda c: costs_by_position(language, c, normalization), copies
    )
    result = torch.zeros_like(theta)
    for t in range(T):
        for u in range(t):
            influence = by_copy[t, u]
            if stop == "future":
                influence = influence[STOP] + influence[CHOICE]
            else:
                influence = influence[CHOICE]
            result += future_weight * discount ** (t - u) * influence
        if stop == "future":
            result += by_copy[t, t].sum(0)
    if stop == "graded":
        length = 1.0 if normalization == "total" else language.length(theta).item()
        result += gradient(lambda at: graded_cost(language, at), theta) / length
    return result


@pytest.mark.parametrize("normalization", ["total", "rate", "neutral"])
@pytest.mark.parametrize("estimator", ["single_step", "rao_blackwell"])
@pytest.mark.parametrize(
    ("discount", "future_weight", "stop"),
    [(1.0, 1.0, "future"), (0.7, 0.6, "future"), (1.0, 1.0, "graded"), (0.7, 0.6, "graded")],
)
def test_the_expected_gradient_is_that_of_the_influences(
    language, normalization, estimator, discount, future_weight, stop
):
    theta = language.theta
    options = {"normalization": normalization, "discount": discount, "stop": stop}
    expected = expected_gradient(
        language,
        theta,
        lambda s: sequence_reverse_kl(
            s, language.counts(theta), estimator=estimator, baseline="none",
            future_weight=future_weight, **options
        ),
        language.student(theta),
    )  # fmt: skip
    exact = definition(language, normalization, discount, future_weight, stop)
    assert (expected - exact).abs().max() <= 1e-9


def test_a_baseline_does_not_change_the_gradient_of_the_choice_alone():
    language = Language(3, 3, 3)
    theta, q = language.theta, language.student(language.theta)

    def expected(baseline, samples):
        counts = language.counts(theta, samples)
        return expected_gradient(
            language,
            theta,
            lambda s: sequence_reverse_kl(
                s, counts, baseline=baseline, normalization="neutral", stop="graded"
            ),
            q,
            samples,
        )

    assert (expected("none", 1) - expected("leave_one_out", 2)).abs().max() <= 1e-9


def test_without_a_future_the_end_has_the_teachers_probability():
    """A student with free parameters for one state, which cannot match the teacher's content: at
    graded's stationary point, the end has the teacher's probability."""
    language = Language(0, 3, 1)
    theta = language.theta
    p_end = language.log_p[0, 0, 0].exp().item()

    def constrained(x):  # the content is fixed, so only the end is learned
        row = torch.stack([x[0], torch.zeros_like(x[0]), 1.5 + torch.zeros_like(x[0])])
        return torch.cat([theta[:-1], row[None]])

    def slope(stop, end):
        at = torch.tensor([end], dtype=torch.float64)
        return expected_gradient(
            Constrained(language, constrained),
            at,
            lambda s: sequence_reverse_kl(
                s, language.counts(theta), baseline="none", normalization="total", stop=stop
            ),
            language.student(constrained(at)),
        ).item()

    content = torch.tensor([0.0, 1.5], dtype=torch.float64)
    end = torch.logsumexp(content, 0).item() + torch.tensor(p_end / (1 - p_end)).log().item()
    assert abs(slope("graded", end)) <= 1e-6
    assert slope("future", end) < -1e-3  # ends more often than the teacher


class Constrained:
    """A language whose student depends on other parameters."""

    def __init__(self, language, parameters):
        self.language, self.sequences, self.parameters = language, language.sequences, parameters

    def stats(self, at):
        return self.language.stats(self.parameters(at))
