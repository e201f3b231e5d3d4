"""Every check that needs no actor: models, tokenizers, lengths, data.

:func:`check` finds everything that makes the run impossible before it says so, and returns what
the run needs, with warnings beside it.
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
from seqkd.models.loading import end_of_sequence_ids, load_config, load_tokenizer
from seqkd.models.lora import check_targets
from seqkd.models.pruning import check_prune
from seqkd.types import Prompt

T = TypeVar("T")


@dataclass(frozen=True)
class Checked:
    """What the checks had to load anyway."""

    tokenizer: Any
    stop_ids: tuple[int, ...]
    train: Sequence[Prompt]
    heldout: Sequence[Prompt]
    corpus: Sequence[Prompt]
    references: Mapping[str, Sequence[str]]
    """The data set's own answers to held-out prompts, by prompt id."""
    sources: tuple[str, ...]
    """What was read from where, a line each."""
    max_model_len: int
    vocabulary: int
    """Tokens that all models have."""
    student: Any
    """transformers config, before any pruning."""
    teachers: dict[str, Any]
    """Likewise, by name, but for those behind an endpoint."""
    warnings: tuple[str, ...]


@dataclass
class Findings:
    """Errors and warnings, in the order in which they were found."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    where: str = ""
    """Put before each: which of several teachers it is about."""

    def attempt(self, check: Callable[..., T], *args: Any) -> T | None:
        """The check's result; None, with its error kept, where it fails or where an argument is
        already missing because of an earlier failure."""
        if any(arg is None for arg in args):
            return None
        try:
            return check(*args)
        except SeqkdError as error:
            self.errors.append(self.where + str(error))
            return None

    def warn(self, check: Callable[..., str | None], *args: Any) -> None:
        """The same for a check that may return a warning."""
        if warning := self.attempt(check, *args):
            self.warnings.append(self.where + warning)


def check(config: Config, teacher_here: bool = True) -> Checked:
    """Raises ConfigError with every error found, each beginning a line. Without its teacher a run
    asks nothing of an endpoint."""
    found = Findings()
    students = config.student.model
    student = found.attempt(load_config, students, "student.model")
    tokenizer = found.attempt(load_tokenizer, students, "student.model") if student else None
    max_model_len = config.data.max_prompt_tokens + config.rollout.max_tokens
    found.attempt(fits_context, student, "student.model", config.data, config.rollout)
    if isinstance(config.student.init, PruneInitConfig):
        found.attempt(check_prune, student, config.student.init)
    found.attempt(check_targets, student, config.student.lora)
    stop_ids = _stop_ids(students, tokenizer, student, "student.model", found)
    if config.data.chat:
        found.attempt(check_turn_end, tokenizer, stop_ids)
    teachers: dict[str, Any] = {}
    for name, teacher in config.teachers.items():
        found.where = f"teacher.teachers.{name}: " if name else ""
        if local := teacher.local:
            teachers[name] = _local_teacher(
                config.data, config.rollout, local, student, tokenizer, stop_ids, found
            )
        if teacher_here and (endpoint := teacher.endpoint):
            _endpoint(config.data, config.rollout, endpoint, student, tokenizer, stop_ids, found)
    found.where = ""
    data = found.attempt(read_data, config, tokenizer, stop_ids)
    found.attempt(every_tag_has_a_teacher, config.teacher, config.data, data)
    if found.errors:
        raise ConfigError("\n".join(found.errors))
    assert tokenizer is not None and stop_ids is not None and data is not None
    vocabulary = min(model.vocab_size for model in (student, *teachers.values()))
    sources = tuple(map(str, data.summaries))
    warnings = (*found.warnings, *data.warnings)
    return Checked(
        tokenizer, stop_ids, data.train, data.heldout, data.corpus, data.references, sources,
        max_model_len, vocabulary, student, teachers, warnings,
    )  # fmt: skip


def _endpoint(
    data: DataConfig,
    rollout: RolloutConfig,
    teacher: EndpointTeacherConfig,
    student: Any,
    tokenizer: Any,
    stop_ids: tuple[int, ...] | None,
    found: Findings,
) -> None:
    client = found.attempt(check_endpoint, teacher)
    if teacher.tokenizer is not None:
        other = found.attempt(load_tokenizer, teacher.tokenizer, "teacher.tokenizer")
        found.attempt(check_same_tokenizer, tokenizer, other, "teacher.tokenizer", _plain(data))
        ends = found.attempt(end_of_sequence_ids, teacher.tokenizer, other, "teacher.tokenizer")
        found.warn(check_same_stop_ids, stop_ids, ends, other)
    if student is not None:
        found.attempt(check_answers, client, tokenizer, student.vocab_size, data, rollout)


def _local_teacher(
    data: DataConfig,
    rollout: RolloutConfig,
    local: LocalTeacherConfig,
    student: Any,
    tokenizer: Any,
    stop_ids: tuple[int, ...] | None,
    found: Findings,
) -> Any:
    name = local.model
    teacher = found.attempt(load_config, name, "teacher.model")
    found.attempt(fits_context, teacher, "teacher.model", data, rollout)
    if student and teacher and student.vocab_size != teacher.vocab_size:
        found.warnings.append(
            f"{found.where}student.model has {student.vocab_size} output rows, teacher.model "
            f"{teacher.vocab_size}: divergences use the first "
            f"{min(student.vocab_size, teacher.vocab_size)}, the rest is padding."
        )
    found.attempt(top_k_fits, teacher, local)
    other = found.attempt(load_tokenizer, name, "teacher.model") if teacher else None
    found.attempt(check_same_tokenizer, tokenizer, other, "teacher.model", _plain(data))
    stops = _stop_ids(name, other, teacher, "teacher.model", found)
    found.warn(check_same_stop_ids, stop_ids, stops, other)
    if data.chat:
        found.warn(check_same_template, tokenizer, other, local.allow_template_mismatch, data)
    return teacher


def _plain(data: DataConfig) -> bool:
    """Whether the tokenizer, and not a template, puts the special tokens around a text."""
    return not data.chat or data.corpus_path is not None


def _stop_ids(
    name: str, tokenizer: Any, model: Any, field: str, found: Findings
) -> tuple[int, ...] | None:
    """What ends a model's completions."""
    ids = found.attempt(end_of_sequence_ids, name, tokenizer, field)
    found.attempt(check_stop_ids, ids, tokenizer, model and model.vocab_size, field)
    return ids


def fits_context(model: Any, name: str, data: DataConfig, rollout: RolloutConfig) -> None:
    """ModelError where the longest prompt and completion exceed a model's context. The last token
    of a completion is read by no scorer, but vLLM wants room for it: a request to sample is refused
    unless its prompt is shorter than ``max_model_len``, one to score unless it fits."""
    prompt, completion = data.max_prompt_tokens, rollout.max_tokens
    context = getattr(model, "max_position_embeddings", None)
    if context and prompt + completion > context:
        raise ModelError(
            f"{name}: data.max_prompt_tokens {prompt} + rollout.max_tokens {completion} = "
            f"{prompt + completion} is beyond its context of {context}. Lower one of the two."
        )
    pieces = data.corpus_tokens if data.corpus_path else 0
    if context and pieces > context:
        raise ModelError(
            f"{name}: data.corpus_tokens {pieces} is beyond its context of {context}. Lower it."
        )


def every_tag_has_a_teacher(teacher: TeacherConfig, data: DataConfig, read: DataSets) -> None:
    """DataError for a row that none of several teachers may have."""
    tables = (table for table in (read.train, read.heldout) if isinstance(table, PromptTable))
    tags: set[str] = set().union(*(table.tags() for table in tables))
    for tag in sorted(tags):
        if not teacher.candidates(tag):
            raise DataError(
                f"data.tag_key: no teacher may have rows with {data.tag_key} {tag!r}. Add "
                "it to the tags of one of teacher.teachers, or add a teacher without tags."
            )


def top_k_fits(model: Any, teacher: LocalTeacherConfig) -> None:
    """ModelError unless the teacher's vocabulary has more than ``top_k`` tokens."""
    if teacher.scores == "top_k" and teacher.top_k >= model.vocab_size:
        raise ModelError(
            f"teacher.top_k: {teacher.top_k} is not below the teacher's vocabulary of "
            f"{model.vocab_size}. Lower it, or set teacher.scores to hidden."
        )
