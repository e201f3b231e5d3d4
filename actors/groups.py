"""Many actors behind one protocol. The only place that waits for Ray."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from actors.learner import RankPart
from seqkd import batching
from seqkd.errors import ActorError, SeqkdError
from seqkd.protocols import Measured, Part, Scores
from seqkd.types import (
    PartResult,
    Prompt,
    Rollout,
    StepResult,
    TeacherScore,
    TrainBatch,
    WeightVersion,
)

SETTLE_S = 5.0
"""After one call has failed, how long the others of its group may take to fail as well."""


def wait(refs: Any, what: str) -> Any:
    """ray.get that raises as soon as one of ``refs`` fails, and the first cause: a death before
    the errors with which the others notice it. SeqkdErrors come as they are."""
    import ray
    from ray.exceptions import RayError

    pending = list(refs) if isinstance(refs, list) else [refs]
    errors: list[RayError] = []
    while pending:
        done, pending = ray.wait(pending, timeout=SETTLE_S if errors else None)
        if not done:
            break
        try:
            ray.get(done)
        except RayError as error:
            errors.append(error)
    if errors:
        raise _first_cause(errors, what) from None
    return ray.get(refs)


def _first_cause(errors: list[Any], what: str) -> SeqkdError:
    from ray.exceptions import RayTaskError

    for error in errors:
        if not isinstance(error, RayTaskError):  # the actor is gone: killed, out of memory
            return ActorError(f"{what} died: {error}")
    causes = [getattr(error, "cause", error) for error in errors]
    for cause in causes:
        if isinstance(cause, SeqkdError):
            return cause
    text = next((line for line in str(causes[0]).splitlines() if line.strip()), "")
    return ActorError(f"{what} failed: {type(causes[0]).__name__}: {text}", details=str(errors[0]))


class RolloutGroup:
    """Engines with the same weights; prompts are dealt out evenly."""

    def __init__(
        self, actors: list[Any], max_tokens: int, learner: LearnerGroup | None, name: str
    ) -> None:
        self.actors, self.max_tokens, self.learner, self.name = actors, max_tokens, learner, name
        self.nodes: list[str] = []
        self.policy_version = 0

    def sample(
        self,
        prompts: Sequence[Prompt],
        samples: Sequence[int],
        seed: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> list[Rollout]:
        """See :class:`seqkd.protocols.Sampler`."""
        seeds = [_seed(f"{self.name}/{seed}/{index}") for index in range(len(prompts))]
        parts = [
            actor.sample.remote(
                list(prompts[i :: len(self.actors)]),
                seeds[i :: len(self.actors)],
                list(samples[i :: len(self.actors)]),
                self.max_tokens,
                temperature,
                top_p,
            )
            for i, actor in enumerate(self.actors)
        ]
        drawn = [iter(part) for part in wait(parts, f"{self.name} sampling")]
        return [next(drawn[i % len(drawn)]) for i, n in enumerate(samples) for _ in range(n)]

    def usage(self) -> dict[str, int]:
        """See :class:`seqkd.protocols.Sampler`."""
        return _usage(self.actors, self.name)

    def load(self, version: WeightVersion) -> None:
        """See :class:`seqkd.protocols.Sampler`."""
        assert self.learner is not None, "a teacher's weights never change"
        self.nodes = self.nodes or wait([a.node.remote() for a in self.actors], self.name)
        remote = None
        if set(self.nodes) != {version.node_id}:
            remote = self.learner.published_bytes(version)
        wait(
            [
                actor.load.remote(version, None if node == version.node_id else remote)
                for actor, node in zip(self.actors, self.nodes, strict=True)
            ],
            f"{self.name} weight sync",
        )
        self.policy_version = version.policy_version


class TeacherGroup:
    """Copies of one teacher; rollouts are dealt out by length."""

    def __init__(self, actors: list[Any], name: str = "") -> None:
        self.actors, self.name = actors, name

    def score(self, rollouts: Sequence[Rollout]) -> dict[str, TeacherScore]:
        """See :class:`seqkd.protocols.Teacher`."""
        ordered = sorted(rollouts, key=lambda r: -len(r.prompt_ids) - len(r.completion_ids))
        parts = [
            actor.score.remote(ordered[i :: len(self.actors)])
            for i, actor in enumerate(self.actors)
        ]
        given = (s for part in wait(parts, "teacher scoring") for s in part)
        scores = {s.sample_id: replace(s, teacher=self.name) for s in given}
        missing = [r.sample_id for r in rollouts if r.sample_id not in scores]
        if missing:
            raise ActorError(
                f"teacher scoring: {len(missing)} rollouts came back without a score. Run with "
                "--verbose for the teacher's own log."
            )
        return scores

    def usage(self) -> dict[str, int]:
        """See :class:`seqkd.protocols.Teacher`."""
        return _usage(self.actors, "teacher")


class LearnerGroup:
    """The DeepSpeed ranks."""

    def __init__(self, ranks: list[Any], micro_batch_prompts: int, tokenizer_from: str) -> None:
        self.ranks, self.micro_batch_prompts = ranks, micro_batch_prompts
        self.tokenizer_from = tokenizer_from
        self.policy_version = 0

    def step(self, parts: Sequence[Part], lr: float) -> StepResult:
        """See :class:`seqkd.protocols.Learner`."""
        dealt = [self._deal(part.rollouts, part.scores) for part in parts]
        results: list[StepResult] = wait(
            [
                rank.step.remote(
                    [
                        RankPart(batches[index], part.counts, part.terms, part.teacher_fraction)
                        for part, batches in zip(parts, dealt, strict=True)
                    ],
                    lr,
                )
                for index, rank in enumerate(self.ranks)
            ],
            "learner step",
        )
        self.policy_version += 1
        of_parts = zip(*(result.parts for result in results), strict=True)
        return StepResult(
            loss=sum(r.loss for r in results),
            grad_norm=results[0].grad_norm,
            parts=tuple(sum(of_part, PartResult()) for of_part in of_parts),
        )

    def measure(self, rollouts: Sequence[Rollout], scores: Scores) -> Measured:
        """See :class:`seqkd.protocols.Learner`."""
        plan = self._partition(rollouts, scores)
        dealt = self._deal(rollouts, scores)
        results = wait(
            [rank.measure.remote(batches) for rank, batches in zip(self.ranks, dealt, strict=True)],
            "learner measuring",
        )
        measured = {}
        for part, values in zip(plan, results, strict=True):
            for micro_batch, of_batch in zip(part, values, strict=True):
                for row, rollout in enumerate(micro_batch):
                    length = len(rollout.completion_ids)
                    measured[rollout.sample_id] = {
                        name: value[row, :length].tolist() for name, value in of_batch.items()
                    }
        return measured

    def publish(self) -> WeightVersion:
        """See :class:`seqkd.protocols.Learner`."""
        version, *_ = wait([rank.publish.remote() for rank in self.ranks], "learner publishing")
        assert isinstance(version, WeightVersion)
        return version

    def published_bytes(self, version: WeightVersion) -> Any:
        """Reference to the published file in Ray's object store."""
        return self.ranks[0].published_bytes.remote(version)

    def export(self, directory: str) -> None:
        """See :class:`seqkd.protocols.Learner`."""
        wait(
            [rank.export.remote(directory, self.tokenizer_from) for rank in self.ranks],
            "learner export",
        )

    def _deal(self, rollouts: Sequence[Rollout], scores: Scores) -> list[list[TrainBatch]]:
        """Each rank's micro-batches."""
        filler = min(rollouts, key=lambda r: len(r.prompt_ids) + len(r.completion_ids))
        return [
            [batching.pack(micro_batch, scores, filler) for micro_batch in part]
            for part in self._partition(rollouts, scores)
        ]

    def _partition(self, rollouts: Sequence[Rollout], scores: Scores) -> list[list[list[Rollout]]]:
        return batching.partition(rollouts, scores, len(self.ranks), self.micro_batch_prompts)


def _usage(actors: list[Any], name: str) -> dict[str, int]:
    counts = wait([actor.usage.remote() for actor in actors], name)
    return dict(sum(map(Counter, counts), Counter()))


def _seed(text: str) -> int:
    """A sampling seed for one prompt, unrelated between samplers, steps and prompts."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") >> 1
