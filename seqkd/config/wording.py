"""Descriptions of a configuration: its models, and the loss and the samples of every phase."""

from __future__ import annotations

from pathlib import PurePath

from seqkd.config.objectives import SequenceReverseKLConfig
from seqkd.config.phases import PhaseConfig, TermConfig
from seqkd.config.run import Config
from seqkd.config.samplers import SAMPLERS
from seqkd.config.student import PruneInitConfig


def describe_term(term: TermConfig) -> str:
    """Describe a term with the options that differ from their defaults, for example "token-level
    forward KL on the teacher's samples"."""
    objective = term.objective
    options = objective.model_dump(exclude_defaults=True, exclude={"kind"})
    if isinstance(objective, SequenceReverseKLConfig):
        always = ("estimator", "baseline", "normalization")
        options = {name: getattr(objective, name) for name in always} | options
    listed = ", ".join(f"{name} {value}" for name, value in options.items())
    weight = "" if term.weight == 1 else f"{term.weight:g} × "
    brackets = f" ({listed})" if listed else ""
    return f"{weight}{objective.label}{brackets} on {SAMPLERS[term.sampler].label}"


def describe_terms(phase: PhaseConfig) -> str:
    """Describe the loss of a phase."""
    return " + ".join(map(describe_term, phase.terms))


def describe_phase(config: Config, name: str, phase: PhaseConfig) -> str:
    """Describe the length and the loss of a phase, for example "warmup, 20 steps: skew KL on
    ..."."""
    return f"{name}, {config.extent(phase)}: {describe_terms(phase)}"


def model_names(config: Config) -> tuple[str, str]:
    """Return short names of the teacher and of the student."""
    init = config.student.init
    student = _short(config.student.model)
    if isinstance(init, PruneInitConfig):
        student += f" without layers {init.drop_layers[0]} to {init.drop_layers[1] - 1}"
    return " + ".join(_short(teacher.model) for teacher in config.teachers.values()), student


def _short(model: str) -> str:
    """Return the last part of a local path, or a hub name unchanged."""
    return PurePath(model).name if model.startswith(("/", "~", ".")) else model
