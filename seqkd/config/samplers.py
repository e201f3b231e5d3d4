"""The samplers: whose completions a term of the loss trains on.

All facts about a sampler are in :data:`SAMPLERS`. Code asks for a fact and compares no names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

SamplerName = Literal["student", "teacher", "mixture", "dataset", "corpus", "teacher_cache"]


@dataclass(frozen=True)
class SamplerTraits:
    """Facts about one sampler."""

    label: str
    """Its completions, in words."""
    objective: str
    """Kind of the objective that a term gets if none is set."""
    on_student: bool = False
    """The student writes some of the completions, with its current weights."""
    on_teacher: bool = False
    """A loaded teacher writes some of the completions."""
    weighted: bool = False
    """Completions come from student and teacher, with importance weights back to the student."""
    from_data: bool = False
    """Completions are read from the data, one per prompt."""
    plain_text: bool = False
    """The data is the corpus, whose texts have no prompts."""
    recorded: bool = False
    """Completions and scores are read from the teacher cache, by ``teacher_cache.records``."""


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
    """Return the names of the samplers that meet ``condition``, in the table's order."""
    return cast(
        tuple[SamplerName, ...], tuple(name for name in SAMPLERS if condition(SAMPLERS[name]))
    )


ON_STUDENT = samplers_where(lambda sampler: sampler.on_student)
"""Samplers for which the student writes completions."""

STUDENT_ALONE = samplers_where(lambda sampler: sampler.on_student and not sampler.on_teacher)
"""Samplers for which no one but the student writes completions."""

(RECORDED,) = samplers_where(lambda sampler: sampler.recorded)
"""Sampler that reads the teacher cache."""
