"""The samplers, which are the sources of the completions that a term of the loss trains on.

All properties of a sampler are in :data:`SAMPLERS`. Code reads a property and never compares names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

SamplerName = Literal["student", "teacher", "mixture", "dataset", "corpus", "teacher_cache"]


@dataclass(frozen=True)
class SamplerTraits:
    """Properties of one sampler."""

    label: str
    """Description of the completions."""
    objective: str
    """Kind of the default objective."""
    on_student: bool = False
    """True if the student, with its current weights, writes some of the completions."""
    on_teacher: bool = False
    """True if a loaded teacher writes some of the completions."""
    weighted: bool = False
    """True if completions of student and teacher are mixed, with importance weights to the
    student's distribution."""
    from_data: bool = False
    """True if completions are read from the data, one per prompt."""
    plain_text: bool = False
    """True if the data is the corpus, whose texts have no prompts."""
    recorded: bool = False
    """True if completions and scores are read from the teacher cache; see
    ``teacher_cache.records``."""


SAMPLERS: dict[str, SamplerTraits] = {
    "student": SamplerTraits(
        "the student's samples", objective="sequence_reverse_kl", on_student=True
    ),
    "teacher": SamplerTraits(
        "the teacher's samples", objective="sequence_forward_kl", on_teacher=True
    ),
    "mixture": SamplerTraits(
        "a mixture of the student's and the teacher's samples",
        objective="sequence_reverse_kl",
        on_student=True,
        on_teacher=True,
        weighted=True,
    ),
    "dataset": SamplerTraits("the data set's answers", objective="sft", from_data=True),
    "corpus": SamplerTraits("plain text", objective="sft", from_data=True, plain_text=True),
    "teacher_cache": SamplerTraits(
        "recorded completions", objective="sequence_forward_kl", recorded=True
    ),
}


def samplers_where(condition: Callable[[SamplerTraits], bool]) -> tuple[SamplerName, ...]:
    """Return the names of the samplers that meet ``condition``, in the order of the table."""
    return cast(
        tuple[SamplerName, ...], tuple(name for name in SAMPLERS if condition(SAMPLERS[name]))
    )


ON_STUDENT = samplers_where(lambda sampler: sampler.on_student)
"""Samplers for which the student writes completions."""

STUDENT_ALONE = samplers_where(lambda sampler: sampler.on_student and not sampler.on_teacher)
"""Samplers for which only the student writes completions."""

(RECORDED,) = samplers_where(lambda sampler: sampler.recorded)
"""Sampler that reads the teacher cache."""
