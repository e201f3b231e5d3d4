"""Focal supervised fine-tuning against its definition."""

from __future__ import annotations

import math

import pytest

from seqkd.config.run import load
from seqkd.objectives import OBJECTIVES
from seqkd.studies.enumerated import Language
from seqkd.types import Counts
from tests.conftest import ROOT


def test_a_token_weighs_by_how_badly_it_is_predicted():
    language = Language(0, 3, 4)
    log_q = language.log_q(language.theta)
    values = [
        log_q[row, t, token].item()
        for row, tokens in enumerate(language.sequences)
        for t, token in enumerate(tokens)
    ]
    total = -sum((1 - math.exp(value)) ** 2 * value for value in values)
    loss = OBJECTIVES["focal_sft"](
        language.stats(language.theta), Counts(1, len(values)), gamma=2.0
    )
    assert loss.item() == pytest.approx(total / len(values), abs=1e-12)


def test_its_configuration():
    config = load(ROOT / "configs" / "focal_sft.yaml")
    assert config.objective.options() == {"gamma": 1.0}
    assert config.objective.stats() == ("student_logprob",)
