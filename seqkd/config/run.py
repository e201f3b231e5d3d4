"""The configuration: a frozen schema, unions keyed by ``kind``, and :func:`load`.

Imports no torch, so ``--help`` and every refusal of bad input answer at once. Combinations that
cannot work are refused here, each with the field, the value and the fix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

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
from seqkd.config.teacher import SingleTeacherConfig, TeacherConfig


class TeacherCacheConfig(BaseConfig):
    """Cache of the teacher's completions and scores, so that nothing is computed twice."""

    path: str
    """Directory of the cache, which several runs may share."""
    records: Literal["teacher", "dataset"] = "teacher"
    """Source of the completions of sampler teacher_cache: the teacher, or the answers in the data
    set."""


class EvaluationConfig(BaseConfig):
    """Evaluation on held-out prompts before, between and after the phases."""

    prompts: int = Field(64, ge=0)
    """Number of held-out prompts; 0 turns evaluation off."""
    samples_per_prompt: int = Field(1, ge=1)
    """Number of completions per prompt by each model."""
    every_steps: int | None = Field(None, ge=1)
    """Number of optimizer steps between evaluations within a phase. If unset: only before, between
    and after the phases."""
    examples: int = Field(3, ge=0)
    """Number of completions that are shown side by side at the end."""


class Config(PhaseConfig):
    """Configuration of a run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run, and of its directory within runs_dir."""
    runs_dir: str = "runs"
    """Directory of the run directories. A relative path is below ~/seqkd if Ray runs the job in a
    copy of the working directory."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of sampling and of the order of the data."""
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
    """Trackers that get the metrics in addition to TensorBoard; see docs/metrics.md."""
    placement: Literal["colocated", "split"] = "colocated"
    """Placement of the roles. colocated: they run alternately on the same cores; split: each role
    has its own cores."""
    cluster: str | None = None
    """Ray address. If unset: the job's own cluster, or a local one."""

    @property
    def phases(self) -> tuple[tuple[str, PhaseConfig], ...]:
        """Names and phases, in the order in which they run."""
        warmup = (("warmup", self.warmup),) if self.warmup else ()
        return (*warmup, ("main", self))

    def extent(self, phase: PhaseConfig) -> str:
        """Return the length of a phase in words."""
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
        """True if training reads the teacher from its cache only, so that none is loaded."""
        recorded = {name for name in self.samplers if SAMPLERS[name].recorded}
        live = [t for _, p in self.phases for t in p.terms if t.sampler not in recorded]
        asked = any(
            SAMPLERS[t.sampler].on_teacher or t.objective.teacher_need != "nothing" for t in live
        )
        return bool(recorded) and not asked

    def source(self, sampler: SamplerName) -> SamplerName:
        """Return the sampler whose completions ``sampler`` reads: for teacher_cache the recorded
        one, else ``sampler`` itself."""
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
        """Return whether the next draw of ``phase`` may start while the learner trains. Completions
        that the student does not write are the same whenever they are drawn."""
        on_student = any(SAMPLERS[name].on_student for name in phase.by_sampler)
        return self.placement == "split" and (
            not on_student or self.rollout.max_off_policy_steps > 0
        )

    @property
    def scored_together(self) -> int | None:
        """Number of completions that the teacher scores at once while others are sampled: as many
        as keep it busy at their longest. None if the two run alternately on whole draws."""
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
    """:func:`seqkd.config.loading.read` a configuration."""
    return read(path, Config, overrides)


def dump(config: Config) -> str:
    """Return the resolved configuration as YAML that :func:`load` reads back to an equal one."""
    data = config.model_dump(mode="json")
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    if "\x85" in text:  # which YAML reads back as a line feed unless it is escaped
        text = yaml.safe_dump(data, sort_keys=False)
    return text
