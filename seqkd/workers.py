"""Handles to the student, the learner and the teachers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

from seqkd.protocols import Finished, Learner, Sampler, Seed, StudentSampler, Teacher
from seqkd.types import Prompt, Rollout, TeacherScore, WeightVersion

Choose = Callable[[str, str], str]
"""Function (tag, prompt_id) -> teacher name; see ``choose`` of the teacher's configuration."""


@dataclass(frozen=True)
class Workers:
    """All workers of the training loop."""

    student: StudentSampler
    learner: Learner
    teachers: Mapping[str, Teacher]
    """Teachers by name. A single teacher has an empty name."""
    teacher_samplers: Mapping[str, Sampler]
    teacher_of: Choose
    distribution: bool
    """True if the teacher's scores contain its distribution, which divergences require."""
    live_teacher: bool = True
    """True if the teacher can score new text. False if its scores come only from a cache."""

    @cached_property
    def teacher(self) -> Teacher:
        """Teacher that scores every rollout with the teacher of its prompt."""
        return (
            self.teachers[""]
            if "" in self.teachers
            else MultiTeacher(self.teachers, self.teacher_of)
        )

    @cached_property
    def teacher_sampler(self) -> Sampler:
        """Sampler that completes every prompt with the teacher of the prompt."""
        return (
            self.teacher_samplers[""]
            if "" in self.teacher_samplers
            else MultiSampler(self.teacher_samplers, self.teacher_of)
        )

    def usage(self) -> dict[str, int]:
        """Return the usage of the teachers' endpoints so far, for text and for scores."""
        return dict(Counter(self.teacher_sampler.usage()) + Counter(self.teacher.usage()))

    def publish(self) -> WeightVersion | None:
        """Publish the learner's weights for the student's sampler. Return None if the sampler
        already has them."""
        if self.student.policy_version == self.learner.policy_version:
            return None
        return self.learner.publish()

    def sync(self) -> None:
        """Load the learner's current weights into the student's sampler."""
        if version := self.publish():
            self.student.load(version)


def renumbered(finished: Finished | None, places: Sequence[int]) -> Finished | None:
    """Return a callback for a call with only the prompts at ``places``."""
    return None if finished is None else lambda i, rollout: finished(places[i], rollout)


class MultiSampler:
    """Samplers of several teachers. Every prompt is completed by its own teacher."""

    def __init__(self, samplers: Mapping[str, Sampler], choose: Choose) -> None:
        self.samplers, self.choose = samplers, choose

    def sample(
        self,
        prompts: Sequence[Prompt],
        samples: Sequence[int],
        seed: Seed,
        temperature: float = 1.0,
        top_p: float = 1.0,
        finished: Finished | None = None,
    ) -> list[Rollout]:
        """See :class:`seqkd.protocols.Sampler`."""
        names = [self.choose(p.tag, p.prompt_id) for p in prompts]
        drawn: dict[int, list[Rollout]] = {}
        for name in dict.fromkeys(names):
            places = [i for i, other in enumerate(names) if other == name]
            rollouts = iter(
                self.samplers[name].sample(
                    [prompts[i] for i in places],
                    [samples[i] for i in places],
                    seed if isinstance(seed, int) else [seed[i] for i in places],
                    temperature,
                    top_p,
                    renumbered(finished, places),
                )
            )
            drawn |= {i: [next(rollouts) for _ in range(samples[i])] for i in places}
        return list(chain.from_iterable(drawn[i] for i in range(len(prompts))))

    def usage(self) -> dict[str, int]:
        """Return the sum over all teachers. See :class:`seqkd.protocols.Sampler`."""
        return dict(sum((Counter(s.usage()) for s in self.samplers.values()), Counter()))


class MultiTeacher:
    """Several teachers. Every rollout is scored by the teacher of its prompt."""

    def __init__(self, teachers: Mapping[str, Teacher], choose: Choose) -> None:
        self.teachers, self.choose = teachers, choose

    def score(self, rollouts: Sequence[Rollout]) -> dict[str, TeacherScore]:
        """See :class:`seqkd.protocols.Teacher`."""
        names = {r.sample_id: self.choose(r.tag, r.prompt_id) for r in rollouts}
        scores: dict[str, TeacherScore] = {}
        for name in dict.fromkeys(names.values()):
            scores |= self.teachers[name].score([r for r in rollouts if names[r.sample_id] == name])
        return scores

    def usage(self) -> dict[str, int]:
        """Return the sum over all teachers. See :class:`seqkd.protocols.Teacher`."""
        return dict(sum((Counter(t.usage()) for t in self.teachers.values()), Counter()))
