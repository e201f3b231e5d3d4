"""The configuration of a run: a frozen schema with unions selected by ``kind``, and :func:`load`.

This module does not import torch, so that ``--help`` and configuration errors appear at once.
Combinations that cannot work are rejected here, with field, value and fix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, model_validator

from seqkd.config.alarms import AlarmsConfig
from seqkd.config.base import BaseConfig, TrackerName
from seqkd.config.compatibility import check
from seqkd.config.data import DataConfig
from seqkd.config.learner import LearnerConfig
from seqkd.config.lifecycle import BudgetConfig, CheckpointsConfig, RecoveryConfig
from seqkd.config.loading import read
from seqkd.config.phases import PhaseConfig, WarmupConfig
from seqkd.config.rollout import RolloutConfig
from seqkd.config.samplers import SAMPLERS, SamplerName
from seqkd.config.student import StudentConfig
from seqkd.config.tasks import TaskConfig
from seqkd.config.teacher import SingleTeacherConfig, TeacherConfig
from seqkd.escaping import CONTROL


class TeacherCacheConfig(BaseConfig):
    """Cache of the teacher's completions and scores, which are then computed only once."""

    path: str
    """Directory of the cache. Several runs may share it."""
    records: Literal["teacher", "dataset"] = "teacher"
    """Source of the completions of sampler teacher_cache. teacher: the teacher's samples; dataset:
    the data set's answers."""


class EvaluationConfig(BaseConfig):
    """Evaluation on held-out prompts before, between and after the phases."""

    prompts: int = Field(64, ge=0)
    """Number of held-out prompts. 0: no evaluation."""
    samples_per_prompt: int = Field(1, ge=1)
    """Number of completions per prompt from each model."""
    every_steps: int | None = Field(None, ge=1)
    """Number of optimizer steps between evaluations within a phase. If unset: evaluation only
    before, between and after the phases."""
    examples: int = Field(3, ge=0)
    """Number of prompts whose completions are printed side by side at the end."""
    tasks: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")], TaskConfig] = Field({})
    """Tasks whose accuracy is measured on the held-out prompts with an answer, by name."""


class Config(PhaseConfig):
    """Configuration of a run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run and of its directory in runs_dir."""
    runs_dir: str = "runs"
    """Parent directory of the run directories. A relative path is relative to ~/seqkd if Ray runs
    the job in a copy of the working directory."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Random seed of sampling and of the order of the data."""
    student: StudentConfig
    teacher: TeacherConfig
    data: DataConfig
    teacher_cache: TeacherCacheConfig | None = None
    rollout: RolloutConfig = RolloutConfig()
    learner: LearnerConfig = LearnerConfig()
    warmup: WarmupConfig | None = None
    budget: BudgetConfig | None = None
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoints: CheckpointsConfig = CheckpointsConfig()
    recovery: RecoveryConfig = RecoveryConfig()
    alarms: AlarmsConfig = AlarmsConfig()
    trackers: tuple[TrackerName, ...] = ()
    """Experiment trackers that receive the metrics in addition to TensorBoard; see
    docs/metrics.md."""
    placement: Literal["colocated", "split"] = "colocated"
    """Placement of the roles. colocated: the roles run alternately on the same cores of one node,
    and share GPUs only if they request fractions; split: every role has its own."""
    cluster: str | None = None
    """Address of the Ray cluster. If unset: the cluster of the job, or a local Ray."""

    @property
    def phases(self) -> tuple[tuple[str, PhaseConfig], ...]:
        """Names and phases in running order."""
        warmup = (("warmup", self.warmup),) if self.warmup else ()
        return (*warmup, ("main", self))

    def extent(self, phase: PhaseConfig) -> str:
        """Describe the length of a phase."""
        steps = f"{phase.steps} step{'s' * (phase.steps > 1)}"
        if self.budget is None or phase is not self:
            return steps
        spent = self.budget.kind.replace("_", " ")
        return f"up to {self.budget.amount:g} {spent} in all, at most {steps}"

    @property
    def samplers(self) -> frozenset[SamplerName]:
        """All samplers used by any term."""
        return frozenset(term.sampler for _, phase in self.phases for term in phase.terms)

    @property
    def teachers(self) -> dict[str, SingleTeacherConfig]:
        """Teachers by name. A single teacher has an empty name."""
        return self.teacher.named

    def with_teachers(self, teachers: Mapping[str, SingleTeacherConfig]) -> Config:
        """Return the configuration with other teachers under the same names."""
        return self.model_copy(update={"teacher": self.teacher.replaced(teachers)})

    @property
    def two_step(self) -> bool:
        """True if training reads the teacher's outputs only from the cache, so that no teacher is
        loaded."""
        recorded = {name for name in self.samplers if SAMPLERS[name].recorded}
        live = [t for _, p in self.phases for t in p.terms if t.sampler not in recorded]
        asked = any(
            SAMPLERS[t.sampler].on_teacher or t.objective.teacher_need != "nothing" for t in live
        )
        return bool(recorded) and not asked

    def source(self, sampler: SamplerName) -> SamplerName:
        """Return the sampler that writes the completions of ``sampler``: for teacher_cache the
        recorded sampler, otherwise ``sampler`` itself."""
        if not SAMPLERS[sampler].recorded:
            return sampler
        assert self.teacher_cache is not None
        return self.teacher_cache.records

    def samples_per_prompt(self, phase: PhaseConfig) -> int:
        """Return the number of samples per prompt in ``phase``."""
        return (
            phase.samples_per_prompt
            if isinstance(phase, WarmupConfig)
            else self.rollout.samples_per_prompt
        )

    def draws_ahead(self, phase: PhaseConfig) -> bool:
        """Return True if the next draw of ``phase`` may start while the learner trains. Completions
        that the student does not write do not depend on when they are drawn."""
        on_student = any(SAMPLERS[name].on_student for name in phase.by_sampler)
        return self.placement == "split" and (
            not on_student or self.rollout.max_off_policy_steps > 0
        )

    @property
    def scored_together(self) -> int | None:
        """Number of completions that the teacher scores at once while others are sampled: enough to
        keep the teacher busy at the maximum length. None if sampling and scoring alternate."""
        longest = self.data.max_prompt_tokens + self.rollout.max_tokens
        if self.placement != "split":
            return None
        return max(teacher.at_once(longest) for teacher in self.teachers.values())

    def lr(self, phase: PhaseConfig) -> float:
        """Return the peak learning rate in ``phase``."""
        return (isinstance(phase, WarmupConfig) and phase.lr) or self.learner.lr

    @model_validator(mode="after")
    def _keys_are_compatible(self) -> Config:
        check(self)
        return self


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration; see :func:`seqkd.config.loading.read`."""
    return read(path, Config, overrides)


def dump(config: Config) -> str:
    """Return the resolved configuration as YAML, from which :func:`load` reads an equal
    configuration."""
    return as_yaml(config.model_dump(mode="json"))


def as_yaml(data: dict[str, Any]) -> str:
    """Return readable YAML in which control characters are escape sequences."""
    text: str = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    return yaml.safe_dump(data, sort_keys=False) if CONTROL.search(text) else text
