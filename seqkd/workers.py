"""Everything that the loop drives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from seqkd.protocols import Learner, Sampler, StudentSampler, Teacher
from seqkd.several import SeveralSamplers, SeveralTeachers
from seqkd.types import WeightVersion


@dataclass
class Workers:
    """The student on both sides, and its teachers."""

    student: StudentSampler
    learner: Learner
    teachers: Mapping[str, Teacher]
    """By name; a single one has an empty name."""
    teacher_samplers: Mapping[str, Sampler]
    teacher_of: Callable[[str, str], str]
    """(tag, prompt_id) -> name of the prompt's teacher."""
    distribution: bool
    """Whether the teacher's scores tell its distribution, and with it divergences."""
    live_teacher: bool = True
    """Whether it can score what it has not seen; not where it is known from a journal alone."""

    @property
    def teacher(self) -> Teacher:
        """Scores every rollout by its prompt's teacher."""
        return SeveralTeachers(self.teachers, self.teacher_of)

    @property
    def teacher_sampler(self) -> Sampler:
        """Has every prompt answered by its teacher."""
        return SeveralSamplers(self.teacher_samplers, self.teacher_of)

    def usage(self) -> dict[str, int]:
        """What was asked of the teachers' endpoints so far, for text and for scores."""
        return dict(Counter(self.teacher_sampler.usage()) + Counter(self.teacher.usage()))

    def publish(self) -> WeightVersion | None:
        """The learner's weights for the student's sampler to load; None where it has them."""
        if self.student.policy_version == self.learner.policy_version:
            return None
        return self.learner.publish()

    def sync(self) -> None:
        """Bring the student's sampler to the learner's weights."""
        if version := self.publish():
            self.student.load(version)
