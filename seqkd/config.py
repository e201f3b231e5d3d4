"""The configuration: a frozen schema, unions keyed by ``kind``, and :func:`load`.

Imports no torch, so ``--help`` and every refusal of bad input answer at once. Combinations that
cannot work are refused here, each with the field, the value and the mend.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from seqkd.config_alarms import Alarms
from seqkd.config_data import Data
from seqkd.config_file import read
from seqkd.config_objectives import NATURAL_OBJECTIVE, Objective, SequenceReverseKL
from seqkd.config_roles import Learner, OneTeacher, Rollout, SeveralTeachers, Student, Teacher
from seqkd.config_run import Budget, Checkpoints, Recovery
from seqkd.config_schema import SamplerName, Schema, TrackerName


class Journal(Schema):
    """Where a teacher's completions and scores are kept, so that none is asked for twice."""

    path: str = Field(description="A directory that several runs may share.")
    records: Literal["teacher", "dataset"] = Field(
        "teacher",
        description="What sampler=journal reads: the teacher's completions, or the rows' answers.",
    )


class Evaluation(Schema):
    """Measured on held-out prompts before, between and after the phases."""

    prompts: int = Field(64, ge=0, description="Held-out prompts; 0 turns evaluation off.")
    samples_per_prompt: int = Field(1, ge=1, description="Completions of each, by each model.")
    every_steps: int | None = Field(
        None, ge=1, description="Measured within a phase too, after so many optimizer steps each."
    )
    examples: int = Field(3, ge=0, description="Completions shown side by side at the end.")


class Term(Schema):
    """One summand of a loss: whose completions, which objective."""

    sampler: SamplerName = Field(
        "student",
        description="Whose completions are learnt from. mixture: each from the teacher with "
        "probability rollout.teacher_fraction; dataset: the rows' answers; corpus: plain text; "
        "journal: what scripts/precompute.py recorded.",
    )
    objective: Objective = Field(description="Left out: the natural one of the sampler.")
    weight: float = Field(1.0, gt=0, description="Factor of the term in the loss.")

    @model_validator(mode="before")
    @classmethod
    def _natural_objective(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        natural = NATURAL_OBJECTIVE.get(str(data.get("sampler", "student")))
        given = data.get("objective") or {}
        if natural and isinstance(given, dict):
            data = {**data, "objective": {"kind": natural, **given}}
        return data

    @model_validator(mode="after")
    def _sampler_fits_objective(self) -> Term:
        if self.sampler not in self.objective.samplers:
            fits = " or ".join(self.objective.samplers)
            raise ValueError(
                f"objective {self.objective.kind!r} cannot use sampler {self.sampler!r}: it is "
                f"defined on samples of the {fits}. Set sampler to {fits}, or leave the "
                f"objective out to get {NATURAL_OBJECTIVE[self.sampler]!r}."
            )
        return self


class Phase(Term):
    """One stretch of training: a term, and more terms that are added to it."""

    plus: tuple[Term, ...] = Field((), description="Terms added to the loss, each with a weight.")
    steps: int = Field(ge=1, description="Optimizer steps; with a budget at most so many.")
    prompts_per_step: int = Field(
        4, ge=1, description="Prompts (answers, texts) a step from each sampler."
    )
    updates_per_rollout: int = Field(
        1,
        ge=1,
        description="Optimizer steps on what is sampled at once; above 1 all but the first learn "
        "from samples of an older student.",
    )

    @model_validator(mode="after")
    def _weights_are_of_the_mixture_that_drew(self) -> Phase:
        if self.weighs_a_mixture and self.updates_per_rollout > 1:
            raise ValueError(
                f"updates_per_rollout {self.updates_per_rollout} learns from samples of an older "
                "student, but the weights of sampler 'mixture' are those of today's. Set it to 1."
            )
        return self

    @property
    def weighs_a_mixture(self) -> bool:
        """Whether completions have the importance weights of a mixture with today's student."""
        return any(t.sampler == "mixture" and t.objective.on_policy for t in self.terms)

    @property
    def terms(self) -> tuple[Term, ...]:
        """Every summand of the loss."""
        return (self, *self.plus)

    @property
    def by_sampler(self) -> dict[SamplerName, tuple[Term, ...]]:
        """The terms that learn from the same completions, the phase's own sampler first."""
        names = dict.fromkeys(term.sampler for term in self.terms)
        return {name: tuple(t for t in self.terms if t.sampler == name) for name in names}


class Warmup(Phase):
    """A phase before the main one, with its own samples and learning rate."""

    samples_per_prompt: int = Field(1, ge=1, description="As rollout.samples_per_prompt.")
    lr: float | None = Field(None, gt=0, description="learner.lr if left out.")


class Config(Phase):
    """Everything a run needs."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="Of the run, and of its directory within runs_dir.",
    )
    runs_dir: str = Field(
        "runs",
        description="Where run directories are. A relative one is below ~/seqkd where Ray runs the "
        "job in a copy of the working directory.",
    )
    seed: int = Field(0, ge=0, description="Of sampling and of the order of the data.")
    student: Student
    teacher: Teacher
    data: Data
    journal: Journal | None = None
    rollout: Rollout = Rollout()
    learner: Learner = Learner()
    warmup: Warmup | None = None
    budget: Budget | None = None
    evaluation: Evaluation = Evaluation()
    checkpoints: Checkpoints = Checkpoints()
    recovery: Recovery = Recovery()
    alarms: Alarms = Alarms()
    trackers: tuple[TrackerName, ...] = Field(
        (), description="Where metrics are sent beside TensorBoard; see docs/metrics.md."
    )
    placement: Literal["colocated", "split"] = Field(
        "colocated",
        description="colocated: roles take turns on the same cores; split: each has its own.",
    )
    cluster: str | None = Field(
        None, description="Ray address; left out: the job's own cluster, or a local one."
    )

    @property
    def phases(self) -> tuple[tuple[str, Phase], ...]:
        """Names and phases in the order in which they run."""
        warmup = (("warmup", self.warmup),) if self.warmup else ()
        return (*warmup, ("main", self))

    def extent(self, phase: Phase) -> str:
        """How long a phase is, in words."""
        steps = f"{phase.steps} step{'s' * (phase.steps > 1)}"
        if self.budget is None or phase is not self:
            return steps
        spent = self.budget.kind.replace("_", " ")
        return f"up to {self.budget.amount:g} {spent} in all, at most {steps}"

    @property
    def samplers(self) -> frozenset[SamplerName]:
        """Of every term."""
        return frozenset(term.sampler for _, phase in self.phases for term in phase.terms)

    @property
    def teachers(self) -> dict[str, OneTeacher]:
        """By name; a single one has an empty name."""
        if isinstance(self.teacher, SeveralTeachers):
            return {name: member.teacher for name, member in self.teacher.members.items()}
        return {"": self.teacher}

    def teacher_of(self, tag: str, prompt_id: str) -> str:
        """Name of a prompt's teacher."""
        if isinstance(self.teacher, SeveralTeachers):
            return self.teacher.choose(tag, prompt_id)
        return ""

    def with_teachers(self, teachers: Mapping[str, OneTeacher]) -> Config:
        """The same with other teachers under the same names."""
        teacher: Any = teachers.get("")
        if isinstance(self.teacher, SeveralTeachers):
            members = {
                name: member.model_copy(update={"teacher": teachers[name]})
                for name, member in self.teacher.members.items()
            }
            teacher = self.teacher.model_copy(update={"members": members})
        return self.model_copy(update={"teacher": teacher})

    @property
    def two_step(self) -> bool:
        """Whether all that is learnt of the teacher is in the journal, so that none is loaded."""
        live = [t for _, p in self.phases for t in p.terms if t.sampler != "journal"]
        asked = any(
            t.sampler in ("teacher", "mixture") or t.objective.teacher_need != "nothing"
            for t in live
        )
        return "journal" in self.samplers and not asked

    def source(self, sampler: SamplerName) -> SamplerName:
        """Whose completions they are: what the journal records, where they come from there."""
        if sampler != "journal":
            return sampler
        assert self.journal is not None
        return self.journal.records

    def samples_per_prompt(self, phase: Phase) -> int:
        """Samples a prompt in ``phase``."""
        return (
            phase.samples_per_prompt
            if isinstance(phase, Warmup)
            else self.rollout.samples_per_prompt
        )

    def draws_ahead(self, phase: Phase) -> bool:
        """Whether the next draw of ``phase`` may begin while the learner is at work: what does not
        come from the student is the same whenever it is drawn."""
        of_student = {"student", "mixture"} & phase.by_sampler.keys()
        return self.placement == "split" and (not of_student or self.rollout.max_staleness > 0)

    @property
    def scored_together(self) -> int | None:
        """How many completions the teacher is given at once while others are drawn: as many as keep
        it busy at their longest. None where the two take turns: all of a draw."""
        longest = self.data.max_prompt_tokens + self.rollout.max_tokens
        if self.placement != "split":
            return None
        return max(teacher.at_once(longest) for teacher in self.teachers.values())

    def lr(self, phase: Phase) -> float:
        """Peak learning rate in ``phase``."""
        return (isinstance(phase, Warmup) and phase.lr) or self.learner.lr

    def _staleness_fits(self) -> None:
        if not self.rollout.max_staleness:
            return
        if self.placement != "split":
            raise ValueError(
                "rollout.max_staleness 1 samples while the learner is at work, but with placement "
                "colocated they take turns on the same cores. Set placement to split, or "
                "rollout.max_staleness to 0."
            )
        if any(phase.weighs_a_mixture for _, phase in self.phases):
            raise ValueError(
                "rollout.max_staleness 1 learns from samples of an older student, but the weights "
                "of sampler 'mixture' are those of today's. Set rollout.max_staleness to 0."
            )

    @model_validator(mode="after")
    def _parts_fit(self) -> Config:
        for name, phase in self.phases:
            where = "warmup." if name == "warmup" else ""
            if phase.prompts_per_step < self.learner.ranks:
                raise ValueError(
                    f"{where}prompts_per_step {phase.prompts_per_step} leaves some of the "
                    f"{self.learner.ranks} learner.ranks with nothing to learn. Set it to "
                    f"{self.learner.ranks} or more."
                )
            for index, term in enumerate(phase.terms):
                field = f"{where}plus.{index - 1}." if index else where
                self._teacher_provides(term.objective, field)
                self._samples_fit(term, self.samples_per_prompt(phase), field)
        self._staleness_fits()
        self._budget_ends_the_run()
        if self.learner.compile and self.student.lora:
            raise ValueError(
                "learner.compile is true, but student.lora puts adapters into the layers, which do "
                "not compile in reasonable time. Set learner.compile to false."
            )
        tagged = isinstance(self.teacher, SeveralTeachers) and any(
            member.tags for member in self.teacher.members.values()
        )
        if tagged and self.data.tag_key is None:
            raise ValueError(
                "teacher.members have tags, but data.tag_key is not set. Name the column of the "
                "data set that holds them."
            )
        if self.evaluation.prompts and not self.data.holds_out:
            raise ValueError(
                f"evaluation.prompts is {self.evaluation.prompts}, but no prompts are held out. "
                "Set data.heldout_path, data.heldout_split or data.heldout_fraction, or "
                "evaluation.prompts to 0."
            )
        return self

    def _budget_ends_the_run(self) -> None:
        if self.budget is None:
            return
        kind, samplers = self.budget.kind, self.by_sampler
        sampled = {self.source(s) for s in samplers} - {"dataset", "corpus"}
        asked = {"teacher", "mixture"} & sampled or any(
            term.objective.teacher_need != "nothing" for term in self.terms
        )
        if (kind == "sampled_tokens" and not sampled) or (kind == "teacher_tokens" and not asked):
            raise ValueError(
                f"budget.kind {kind!r} is not spent by objective {self.objective.kind!r} on "
                f"samples of the {self.sampler}, so it would never end the run. Choose another "
                "kind, such as learner_tokens."
            )
        if self.warmup and kind == "prompts":
            of = self.warmup
            drawn = of.steps * of.prompts_per_step * len(of.by_sampler)
            if drawn >= self.budget.amount:
                raise ValueError(
                    f"budget.amount {self.budget.amount:g} prompts is spent by the warm-up, which "
                    f"draws {drawn}. Set it higher, or warmup.steps lower."
                )

    def _teacher_provides(self, objective: Objective, where: str) -> None:
        scores, need = self.teacher.scores, objective.teacher_need
        if need == "distribution" and not self.teacher.distribution:
            raise ValueError(
                f"{where}objective {objective.kind!r} needs the teacher's distribution, but "
                f"teacher.scores is {scores!r}. "
                + (
                    "Set it to top_k, where the endpoint gives log-probs and has the student's "
                    "tokenizer. Else set sampler to teacher, or use a local teacher (kind vllm or "
                    "hf)."
                    if any(t.kind == "openai" for t in self.teachers.values())
                    else "Set teacher.scores to hidden or top_k."
                )
            )
        if need == "logprobs" and scores == "none":
            raise ValueError(
                f"{where}objective {objective.kind!r} needs the teacher's log-probs, but "
                "teacher.scores is 'none'. Set it to logprobs, where the endpoint gives them and "
                "has the student's tokenizer. Else set sampler to teacher, or use a local teacher "
                "(kind vllm or hf)."
            )
        sampled = "teacher_logprob" in objective.stats() and objective.running
        if sampled and scores == "top_k":
            raise ValueError(
                f"{where}objective.estimator charges log-ratios of the whole distribution, but its "
                "running costs would be those of teacher.scores 'top_k', which are lower. Set "
                "objective.estimator to rao_blackwell, or teacher.scores to logprobs or hidden."
            )
        wanted = objective.divergence()
        if wanted and wanted[2] != 1 and scores == "top_k":
            raise ValueError(
                f"{where}objective.temperature {wanted[2]:g} changes the share of the tail, which "
                "teacher.scores 'top_k' knows at temperature 1 only. Set it to 1, or "
                "teacher.scores to hidden (a teacher of kind vllm or hf)."
            )

    def _samples_fit(self, term: Term, samples: int, where: str) -> None:
        objective, rollout = term.objective, self.rollout
        chat = any(getattr(t, "api", "") == "chat" for t in self.teachers.values())
        by_text = self.teacher.scores == "none" or chat
        if term.sampler == "mixture" and by_text:
            raise ValueError(
                f"{where}sampler 'mixture' weighs each completion by the teacher's probability of "
                "it, which is not known of text. Set teacher.api to completions and "
                "teacher.scores to logprobs or top_k, or sampler to teacher or student."
            )
        tempered = rollout.temperature != 1 or rollout.top_p != 1
        if tempered and (objective.on_policy or term.sampler == "mixture"):
            raise ValueError(
                f"{where}objective {objective.kind!r} is an expectation under the student "
                f"itself, but rollout draws with temperature {rollout.temperature:g} and "
                f"top_p {rollout.top_p:g}. Set both to 1."
            )
        corrected = [n for n in ("clip_ratio", "truncated_is") if getattr(objective, n, None)]
        if corrected and term.sampler == "mixture":
            raise ValueError(
                f"{where}objective.{corrected[0]} compares a token with the student that drew it, "
                "but sampler 'mixture' has tokens that the teacher drew. Set sampler to student."
            )
        if (
            isinstance(objective, SequenceReverseKL)
            and objective.baseline == "leave_one_out"
            and samples < 2
        ):
            raise ValueError(
                f"{where}objective.baseline 'leave_one_out' compares the samples of a prompt, "
                f"but samples_per_prompt is {samples}. Set it to at least 2, or baseline to none."
            )
        if term.sampler == "journal" and self.journal is None:
            raise ValueError(
                f"{where}sampler 'journal' reads what scripts/precompute.py wrote, but journal is "
                "not set. Set journal.path to its directory."
            )
        if self.source(term.sampler) not in objective.samplers:
            raise ValueError(
                f"{where}objective {objective.kind!r} is defined on samples of the "
                f"{' or '.join(objective.samplers)}, but journal.records is "
                f"{self.source(term.sampler)!r}. Set objective.kind to "
                f"{NATURAL_OBJECTIVE[self.source(term.sampler)]}, or to a token-level one."
            )
        if term.sampler == "corpus" and self.data.corpus_path is None:
            raise ValueError(
                f"{where}sampler 'corpus' reads plain text, but data.corpus_path is not set. Name "
                "a file of texts."
            )


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """:func:`seqkd.config_file.read` a configuration."""
    return read(path, Config, overrides)


def dump(config: Config) -> str:
    """The resolved configuration as YAML that :func:`load` reads back to an equal one."""
    data = config.model_dump(mode="json")
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    if "\x85" in text:  # which YAML reads back as a line feed unless it is escaped
        text = yaml.safe_dump(data, sort_keys=False)
    return text
