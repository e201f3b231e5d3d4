"""Terms of a loss in nats per token or per sequence."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from seqkd.config.phases import TermConfig
from seqkd.learner.loss import RankPart
from seqkd.types import Counts, Divergence

MASK = torch.tensor([[True, True, True], [True, False, False]])
BATCH = SimpleNamespace(loss_mask=MASK, group=torch.tensor([0, 1]), rollout_logprobs=None)
STATS = {
    "student_logprob": torch.tensor([[-1.0, -2.0, -3.0], [-4.0, 0.0, 0.0]]),
    "reverse_kl": torch.tensor([[0.5, 0.25, 1.0], [2.0, 0.0, 0.0]]),
    Divergence("token_reverse_kl"): torch.tensor([[0.5, 0.25, 1.0], [2.0, 0.0, 0.0]]),
}
SUM_NLL, SUM_KL, TOKENS, SEQUENCES = 10.0, 3.75, 8, 4
"""The batch is half of the step."""
EXPECTED_LENGTH = 2.5
COUNTS = Counts(SEQUENCES, TOKENS, 0.7, EXPECTED_LENGTH, torch.ones(3), torch.ones(3))


def loss(sampler, unit, **objective):
    term = TermConfig(sampler=sampler, objective=objective, unit=unit, weight=3.0)
    return RankPart([], COUNTS, (term,), None).loss(BATCH, STATS).item() / 3


@pytest.mark.parametrize(
    ("sampler", "kind", "summed"),
    [
        ("dataset", "sft", SUM_NLL),
        ("teacher", "sequence_forward_kl", SUM_NLL),
        ("student", "token_reverse_kl", SUM_KL),
    ],
)
def test_a_sum_over_tokens_is_divided_by_the_unit(sampler, kind, summed):
    assert loss(sampler, "token", kind=kind) == pytest.approx(summed / TOKENS)
    assert loss(sampler, "sequence", kind=kind) == pytest.approx(summed / SEQUENCES)


@pytest.mark.parametrize(
    ("normalization", "baseline", "natural", "length"),
    [
        ("total", "none", "sequence", TOKENS / SEQUENCES),
        ("minillm", "none", "sequence", TOKENS / SEQUENCES),
        ("total", "position_mean", "sequence", EXPECTED_LENGTH),
        ("rate", "none", "token", EXPECTED_LENGTH),
        ("neutral", "none", "token", EXPECTED_LENGTH),
    ],
)
def test_policy_gradients_are_converted_by_the_length(normalization, baseline, natural, length):
    """Those that estimate the length over past batches are converted by the estimate, which does
    not depend on the samples."""
    options = {"kind": "sequence_reverse_kl", "normalization": normalization, "baseline": baseline}
    values = {unit: loss("student", unit, **options) for unit in (None, "token", "sequence")}
    assert values[None] == values[natural]
    assert values["sequence"] == pytest.approx(values["token"] * length)
    assert not math.isclose(values["token"], 0, abs_tol=1e-3)
