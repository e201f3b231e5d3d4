"""Descriptions of configurations."""

from __future__ import annotations

from seqkd.config.wording import describe_phase, model_names
from tests.report_runs import configuration


def phases(config):
    return [describe_phase(config, name, phase) for name, phase in config.phases]


def test_phases_are_described_with_their_options():
    warmup, main = phases(configuration("x"))
    assert warmup == "warmup, 20 steps: token-level forward KL on the teacher's samples"
    assert main == (
        "main, 40 steps: sequence-level reverse KL (estimator rao_blackwell, baseline "
        "leave_one_out, normalization minillm) on a mixture of the student's and the teacher's "
        "samples + 0.1 × supervised fine-tuning on the data set's answers"
    )
    (gjsd,) = phases(
        configuration("x", warmup=None, extra_terms=[], objective={"kind": "gjsd", "beta": 0.25})
    )
    assert "generalized Jensen-Shannon divergence (beta 0.25)" in gjsd


def test_models_are_named_by_the_last_part_of_their_path():
    assert model_names(configuration("x")) == (
        "SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct without layers 10 to 17",
    )  # fmt: skip
