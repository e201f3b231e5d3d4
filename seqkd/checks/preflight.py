"""Checks that need no actors: models, tokenizers, lengths, data.

:func:`check` collects all errors before it raises. It returns the objects that the run needs, and
warnings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from seqkd.checks.teacher_endpoint import check_answers, check_endpoint
from seqkd.checks.tokenizers import (
    check_same_stop_ids,
    check_same_template,
    check_same_tokenizer,
    check_stop_ids,
    check_turn_end,
)
from seqkd.config.data import DataConfig
from seqkd.config.rollout import RolloutConfig
from seqkd.config.run import Config
from seqkd.config.student import PruneInitConfig
from seqkd.config.teacher import EndpointTeacherConfig, LocalTeacherConfig, TeacherConfig
from seqkd.data.dataset import DataSets, read_data
from seqkd.data.prompt_table import PromptTable
from seqkd.errors import ConfigError, DataError, ModelError, SeqkdError
from seqkd.evaluation.tasks import check_tasks
from seqkd.models.loading import end_of_sequence_ids, load_tokenizer
from seqkd.models.lora import check_targets
from seqkd.models.model_files import load_complete
from seqkd.models.pruning import check_prune
from seqkd.types import Prompt

T = TypeVar("T")


@dataclass(frozen=True)
class Checked:
    """Objects from the checks that the run needs."""

    tokenizer: Any
    stop_ids: tuple[int, ...]
    train: Sequence[Prompt]
    heldout: Sequence[Prompt]
    corpus: Sequence[Prompt]
    content_tokens: tuple[str, ...]
    """Added tokens that text may contain as tokens."""
    references: Mapping[str, Sequence[str]]
    """Reference answers of the data set to held-out prompts, by prompt id."""
    sources: tuple[str, ...]
    """One line per source of data."""
    max_model_len: int
    vocabulary: int
    """Number of tokens that all models have."""
    student: Any
    """transformers config, before pruning."""
    teachers: dict[str, Any]
    """transformers configs of the local teachers, by name."""
    warnings: tuple[str, ...]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens without special tokens."""
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True))


@dataclass
class Findings:
    """Errors and warnings, in the order in which they were found."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    where: str = ""
    """Prefix of messages that names the teacher, if there are several teachers."""

    def attempt(self, check: Callable[..., T], *args: Any) -> T | None:
        """Return the check's result, or None if the check fails. Its error is recorded. A check
        with an argument that is None because of an earlier failure is not run."""
        if any(arg is None for arg in args):
            return None
        try:
            return check(*args)
        except SeqkdError as error:
            self.errors.append(self.where + str(error))
            return None

    def warn(self, check: Callable[..., str | None], *args: Any) -> None:
        """Run a check that may return a warning."""
        if warning := self.attempt(check, *args):
            self.warnings.append(self.where + warning)


def check(config: Config, teacher_here: bool = True) -> Checked:
    """Return the objects that the run needs. Raises ConfigError with all errors, one per line.
    Endpoints are called only if ``teacher_here``."""
    findings = Findings()
    students = config.student.model
    student = findings.attempt(load_complete, students, "student.model")
    tokenizer = findings.attempt(load_tokenizer, students, "student.model") if student else None
    max_model_len = config.data.max_prompt_tokens + config.rollout.max_tokens
    findings.attempt(fits_context, student, "student.model", config.data, config.rollout)
    if isinstance(config.student.init, PruneInitConfig):
        findings.attempt(check_prune, student, config.student.init)
    findings.attempt(check_targets, student, config.student.lora)
    stop_ids = _stop_ids(students, tokenizer, student, "student.model", findings)
    if config.data.chat:
        findings.attempt(check_turn_end, tokenizer, stop_ids)
    teachers: dict[str, Any] = {}
    for name, teacher in config.teachers.items():
        findings.where = f"teacher.teachers.{name}: " if name else ""
        if local := teacher.local:
            teachers[name] = _local_teacher(
                config.data, config.rollout, local, student, tokenizer, stop_ids, findings
            )
        if teacher_here and (endpoint := teacher.endpoint):
            _endpoint(config.data, config.rollout, endpoint, student, tokenizer, stop_ids, findings)
    findings.where = ""
    data = findings.attempt(read_data, config, tokenizer, stop_ids)
    findings.attempt(every_tag_has_a_teacher, config.teacher, config.data, data)
    findings.attempt(check_tasks, config.evaluation.tasks, data and data.references)
    if findings.errors:
        raise ConfigError("\n".join(findings.errors))
    assert tokenizer is not None and stop_ids is not None and data is not None
    vocabulary = min(model.vocab_size for model in (student, *teachers.values()))
    sources = tuple(map(str, data.summaries))
    warnings = (*findings.warnings, *data.warnings)
    return Checked(
        tokenizer, stop_ids, data.train, data.heldout, data.corpus, config.data.content_tokens,
        data.references, sources, max_model_len, vocabulary, student, teachers, warnings,
    )  # fmt: skip


def _endpoint(
    data: DataConfig,
    rollout: RolloutConfig,
    teacher: EndpointTeacherConfig,
    student: Any,
    tokenizer: Any,
    stop_ids: tuple[int, ...] | None,
    findings: Findings,
) -> None:
    client = findings.attempt(check_endpoint, teacher)
    if teacher.tokenizer is not None:
        other = findings.attempt(load_tokenizer, teacher.tokenizer, "teacher.tokenizer")
        findings.attempt(check_same_tokenizer, tokenizer, other, "teacher.tokenizer", _plain(data))
        ends = findings.attempt(end_of_sequence_ids, teacher.tokenizer, other, "teacher.tokenizer")
        findings.warn(check_same_stop_ids, stop_ids, ends, other)
    if student is not None:
        findings.attempt(check_answers, client, tokenizer, student.vocab_size, data, rollout)


def _local_teacher(
    data: DataConfig,
    rollout: RolloutConfig,
    local: LocalTeacherConfig,
    student: Any,
    tokenizer: Any,
    stop_ids: tuple[int, ...] | None,
    findings: Findings,
) -> Any:
    name = local.model
    teacher = findings.attempt(load_complete, name, "teacher.model")
    findings.attempt(fits_context, teacher, "teacher.model", data, rollout)
    if student and teacher and student.vocab_size != teacher.vocab_size:
        findings.warnings.append(
            f"{findings.where}student.model has {student.vocab_size} output rows and teacher.model "
            f"{teacher.vocab_size}. Divergences use the first "
            f"{min(student.vocab_size, teacher.vocab_size)} rows; the rest is padding."
        )
    findings.attempt(top_k_fits, teacher, local)
    other = findings.attempt(load_tokenizer, name, "teacher.model") if teacher else None
    findings.attempt(check_same_tokenizer, tokenizer, other, "teacher.model", _plain(data))
    stops = _stop_ids(name, other, teacher, "teacher.model", findings)
    findings.warn(check_same_stop_ids, stop_ids, stops, other)
    if data.chat:
        findings.warn(check_same_template, tokenizer, other, local.allow_template_mismatch, data)
    return teacher


def _plain(data: DataConfig) -> bool:
    """Return True if the tokenizer, not a template, adds the special tokens around a text."""
    return not data.chat or data.corpus_path is not None


def _stop_ids(
    name: str, tokenizer: Any, model: Any, field: str, findings: Findings
) -> tuple[int, ...] | None:
    """Return the token ids that end a model's completions."""
    ids = findings.attempt(end_of_sequence_ids, name, tokenizer, field)
    findings.attempt(check_stop_ids, ids, tokenizer, model and model.vocab_size, field)
    return ids


def fits_context(model: Any, name: str, data: DataConfig, rollout: RolloutConfig) -> None:
    """Raise ModelError if the longest prompt and completion exceed a model's context.

    The last token of a completion is never an input of a scorer, but vLLM requires room for it. It
    samples only if the prompt is shorter than ``max_model_len``, and scores only texts that fit.
    """
    prompt, completion = data.max_prompt_tokens, rollout.max_tokens
    context = getattr(model, "max_position_embeddings", None)
    if context and prompt + completion > context:
        raise ModelError(
            f"{name}: data.max_prompt_tokens {prompt} + rollout.max_tokens {completion} = "
            f"{prompt + completion} exceeds the model's context of {context}. Lower one of the two."
        )
    pieces = data.corpus_tokens if data.corpus_path else 0
    if context and pieces > context:
        raise ModelError(
            f"{name}: data.corpus_tokens {pieces} exceeds the model's context of {context}. Lower "
            "data.corpus_tokens."
        )


def every_tag_has_a_teacher(teacher: TeacherConfig, data: DataConfig, read: DataSets) -> None:
    """Raise DataError if a row has a tag that no teacher accepts."""
    tables = (table for table in (read.train, read.heldout) if isinstance(table, PromptTable))
    tags: set[str] = set().union(*(table.tags() for table in tables))
    for tag in sorted(tags):
        if not teacher.candidates(tag):
            raise DataError(
                f"data.tag_key: no teacher accepts rows with {data.tag_key} {tag!r}. Add the tag "
                "to one of teacher.teachers, or add a teacher without tags."
            )


def top_k_fits(model: Any, teacher: LocalTeacherConfig) -> None:
    """Raise ModelError unless the teacher's vocabulary has more than ``top_k`` tokens."""
    if teacher.scores == "top_k" and teacher.top_k >= model.vocab_size:
        raise ModelError(
            f"teacher.top_k: {teacher.top_k} is not below the teacher's vocabulary size of "
            f"{model.vocab_size}. Lower teacher.top_k, or set teacher.scores to hidden."
        )
