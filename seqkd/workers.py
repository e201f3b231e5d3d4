"""Everything that the loop drives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from seqkd.protocols import Finished, Learner, Sampler, StudentSampler, Teacher
from seqkd.types import Prompt, Rollout, TeacherScore, WeightVersion


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
        return MultiTeacher(self.teachers, self.teacher_of)

    @property
    def teacher_sampler(self) -> Sampler:
        """Has every prompt answered by its teacher."""
        return MultiSampler(self.teacher_samplers, self.teacher_of)

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


Choose = Callable[[str, str], str]
"""(tag, prompt_id) -> the teacher's name; see :meth:`seqkd.config.run.Config.teacher_of`."""


class MultiSampler:
    """Every prompt goes to its teacher's sampler."""

    def __init__(self, samplers: Mapping[str, Sampler], choose: Choose) -> None:
        self.samplers, self.choose = samplers, choose

    def sample(
        self,
        prompts: Sequence[Prompt],
        samples: Sequence[int],
        seed: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        finished: Finished | None = None,
    ) -> list[Rollout]:
        """See :class:`seqkd.protocols.Sampler`."""
        names = [self.choose(p.tag, p.prompt_id) for p in prompts]
        drawn: dict[int, list[Rollout]] = {}
        for name in dict.fromkeys(names):
            places = [i for i, of in enumerate(names) if of == name]
            of_teacher = iter(
                self.samplers[name].sample(
                    [prompts[i] for i in places],
                    [samples[i] for i in places],
                    seed,
                    temperature,
                    top_p,
                    finished,
                )
            )
            drawn |= {i: [next(of_teacher) for _ in range(samples[i])] for i in places}
        return list(chain.from_iterable(drawn[i] for i in range(len(prompts))))

    def usage(self) -> dict[str, int]:
        """See :class:`seqkd.protocols.Sampler`: the sum over all."""
        return dict(sum((Counter(s.usage()) for s in self.samplers.values()), Counter()))


class MultiTeacher:
    """Every rollout is scored by its prompt's teacher."""

    def __init__(self, teachers: Mapping[str, Teacher], choose: Choose) -> None:
        self.teachers, self.choose = teachers, choose

    def score(self, rollouts: Sequence[Rollout]) -> dict[str, TeacherScore]:
        """See :class:`seqkd.protocols.Teacher`."""
        names = {r.sample_id: self.choose(r.tag, r.prompt_id) for r in rollouts}
        scores: dict[str, TeacherScore] = {}
        for name in dict.fromkeys(names.values()):
            theirs = self.teachers[name].score([r for r in rollouts if names[r.sample_id] == name])
            scores |= theirs
        return scores

    def usage(self) -> dict[str, int]:
        """See :class:`seqkd.protocols.Teacher`: the sum over all."""
        return dict(sum((Counter(t.usage()) for t in self.teachers.values()), Counter()))
