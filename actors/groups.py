"""Groups of actors behind the protocols of :mod:`seqkd.protocols`."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from actors.pool import READING, Calls, Failure, Pool, have_succeeded, is_alive, kill_orphans
from seqkd.checks.invariants import check_sampled
from seqkd.errors import ActorError, LearnerLost
from seqkd.learner.batching import Layout, pack, partition
from seqkd.learner.loss import RankPart
from seqkd.protocols import Finished, Measured, Part, Scores, Seed
from seqkd.training.control import Control
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
"""Time that the other ranks have to fail after one rank has failed."""


class RolloutGroup:
    """Engines with the same weights. Prompts are distributed evenly."""

    def __init__(self, pool: Pool, max_tokens: int, learner: LearnerGroup | None = None) -> None:
        self.pool, self.max_tokens, self.learner = pool, max_tokens, learner
        self.policy_version: int | None = 0
        self.loaded: WeightVersion | None = None
        pool.on_replaced = self._load_again
        if learner is not None:  # without it there are no weights to load
            pool.raise_root_cause = learner.alive

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
        each = [f"{seed}/{i}" for i in range(len(prompts))] if isinstance(seed, int) else seed
        seeds = [_seed(f"{self.pool.name}/{text}") for text in each]
        engines = len(self.pool.actors)
        drawn: dict[tuple[int, int], Rollout] = {}

        def arrived(engine: int, completion: tuple[int, int, Rollout]) -> None:
            place, index, rollout = completion
            at = engine + place * engines, index
            # A repeated completion comes from the replacement of a lost engine. The first one is
            # kept, because it may already be scored.
            if at not in drawn:
                drawn[at] = rollout
                if finished:
                    finished(at[0], rollout)

        self.pool.stream(
            "sample",
            [
                (
                    list(prompts[i::engines]),
                    seeds[i::engines],
                    list(samples[i::engines]),
                    self.max_tokens,
                    temperature,
                    top_p,
                )
                for i in range(engines)
            ],
            arrived,
            "sampling",
        )
        for i in range(engines):
            completions = [drawn[at] for at in sorted(drawn) if at[0] % engines == i]
            engine = f"{self.pool.name} {i}"
            check_sampled(engine, prompts[i::engines], samples[i::engines], completions)
        return [drawn[at] for at in sorted(drawn)]

    def usage(self) -> dict[str, int]:
        """See :class:`seqkd.protocols.Sampler`."""
        return _usage(self.pool)

    def load(self, version: WeightVersion) -> None:
        """See :class:`seqkd.protocols.StudentSampler`."""
        # Set first: publishing overwrote the previous weights, so an engine replaced during the
        # load needs this version.
        self.loaded = version
        self._load(version, range(len(self.pool.actors)))
        self.policy_version = version.policy_version

    def mark_stale(self) -> None:
        """See :class:`seqkd.protocols.StudentSampler`."""
        self.policy_version = self.loaded = None

    def _load_again(self, index: int) -> None:
        """Load the group's current weights into a new engine."""
        if self.loaded is not None:
            self._load(self.loaded, [index])

    def _load(self, version: WeightVersion, engines: Sequence[int]) -> None:
        assert self.learner is not None, "a teacher's weights never change"
        nodes = self._each(engines, "node", lambda i: ())
        remote = None
        if {nodes[i] for i in engines} != {version.node_id}:
            remote = self.learner.published_bytes(version)
        self._each(
            engines,
            "load",
            lambda i: (version, None if nodes[i] == version.node_id else remote),
            "weight sync",
        )

    def _each(
        self,
        engines: Sequence[int],
        method: str,
        arguments: Callable[[int], tuple[Any, ...]],
        what: str = "",
    ) -> list[Any]:
        indices = range(len(self.pool.actors))
        calls = [arguments(i) if i in engines else None for i in indices]
        return self.pool.call(method, calls, what)

    def logprobs(self, token_ids: Sequence[int]) -> list[list[float]]:
        """See :class:`seqkd.protocols.StudentSampler`."""
        return self.pool.each("logprobs", list(token_ids), what="scoring")


class TeacherGroup:
    """Copies of one teacher. Rollouts are distributed by length."""

    def __init__(self, pool: Pool, name: str = "") -> None:
        self.pool, self.name = pool, name

    def score(self, rollouts: Sequence[Rollout]) -> dict[str, TeacherScore]:
        """See :class:`seqkd.protocols.Teacher`."""
        ordered = sorted(rollouts, key=lambda r: -len(r.prompt_ids) - len(r.completion_ids))
        copies = len(self.pool.actors)
        assigned = [(ordered[i::copies],) if i < len(ordered) else None for i in range(copies)]
        parts = self.pool.call("score", assigned, "scoring")
        all_scores = (score for part in parts for score in part or [])
        scores = {score.sample_id: replace(score, teacher=self.name) for score in all_scores}
        missing = [r.sample_id for r in rollouts if r.sample_id not in scores]
        if missing:
            raise ActorError(
                f"teacher scoring: {len(missing)} rollouts were returned without a score. Run with "
                "--verbose to see the teacher's log."
            )
        return scores

    def usage(self) -> dict[str, int]:
        """See :class:`seqkd.protocols.Teacher`."""
        return _usage(self.pool)


class LearnerGroup:
    """DeepSpeed ranks. If one rank is lost, all ranks are restarted."""

    def __init__(
        self,
        create: Callable[[], list[Any]],
        starting: tuple[Any, ...],
        micro_batch_tokens: int,
        tokenizer_from: str,
        control: Control | None = None,
    ) -> None:
        """Set up the group without starting it. ``create()`` returns the actors, whose
        ``start(rank, master, *starting)`` makes them ranks."""
        self.create, self.starting, self.control = create, starting, control or Control()
        self.layout, self.tokenizer_from = Layout(micro_batch_tokens), tokenizer_from
        self.ranks: list[Any] = []
        self.starts: list[Any] = []
        self.policy_version = 0
        self.is_consistent = True
        """True if all ranks are at the same step, so that the group may be saved."""

    def begin(self) -> None:
        """Create the actors and start them without waiting. Raises LearnerLost if the first actor
        is lost."""
        self.ranks, self.starts = self.create(), []
        try:
            (master,) = self._results("start", [self.ranks[0].rendezvous.remote()])
        except LearnerLost:
            self.kill()
            raise
        self.starts = [r.start.remote(i, master, *self.starting) for i, r in enumerate(self.ranks)]
        self.policy_version, self.is_consistent = 0, True

    def ready(self) -> None:
        """Wait until all ranks are ready. A group that is lost while starting is started again."""
        raised = ""
        while True:
            try:
                if not self.starts:
                    self.begin()
                sharing, *_ = self._results("start", self.starts)
                self.layout = replace(self.layout, sharing=sharing)
                return
            except LearnerLost as lost:
                self.kill()
                raised = lost.raise_if_repeated(raised)
                self.control.restart("the learner", lost.cause)

    def is_ready(self) -> bool:
        """Return True if all ranks have started."""
        return bool(self.starts) and have_succeeded(self.starts)

    def restart(self) -> None:
        """See :class:`seqkd.protocols.Learner`."""
        self.kill()
        self.ready()

    def kill(self) -> None:
        """End all ranks, including ranks that wait for a dead rank."""
        import ray

        for rank in self.ranks:
            with suppress(Exception):  # the actor may already be dead
                ray.kill(rank)
        self.ranks, self.starts = [], []

    def step(self, parts: Sequence[Part], lr: float) -> StepResult:
        """See :class:`seqkd.protocols.Learner`."""
        assigned = [self._shard(part.rollouts, part.scores) for part in parts]
        refs = [
            rank.step.remote(
                [
                    RankPart(batches[index], part.counts, part.terms, part.teacher_fraction)
                    for part, batches in zip(parts, assigned, strict=True)
                ],
                lr,
            )
            for index, rank in enumerate(self.ranks)
        ]
        del assigned  # Ray's object store has a copy
        self.is_consistent = False
        results: list[StepResult] = self._results("step", refs, self.control.check_after_grace)
        self.is_consistent = True
        self.policy_version += 1
        by_part = zip(*(result.parts for result in results), strict=True)
        return StepResult(
            loss=sum(r.loss for r in results),
            grad_norm=results[0].grad_norm,
            parts=tuple(sum(ranks, PartResult()) for ranks in by_part),
            skipped=results[0].skipped,
        )

    def measure(
        self, rollouts: Sequence[Rollout], scores: Scores, ends: tuple[int, ...] = ()
    ) -> Measured:
        """See :class:`seqkd.protocols.Learner`."""
        plan = self._partition(rollouts, scores)
        assigned = self._shard(rollouts, scores)
        refs = [rank.measure.remote(b, ends) for rank, b in zip(self.ranks, assigned, strict=True)]
        measured = {}
        for part, values in zip(plan, self._results("measuring", refs), strict=True):
            for micro_batch, statistics in zip(part, values, strict=True):
                for row, rollout in enumerate(micro_batch):
                    length = len(rollout.completion_ids)
                    measured[rollout.sample_id] = {
                        name: value[row, :length].tolist() for name, value in statistics.items()
                    }
        return measured

    def publish(self) -> WeightVersion:
        """See :class:`seqkd.protocols.Learner`."""
        version, *_ = self._each("publish", what="publishing")
        assert isinstance(version, WeightVersion)
        return version

    def published_bytes(self, version: WeightVersion) -> Any:
        """Return a reference to the bytes of the published file, even while the learner is
        running a step."""
        return self.ranks[0].published_bytes.options(concurrency_group=READING).remote(version)

    def export(self, directory: str) -> None:
        """See :class:`seqkd.protocols.Learner`."""
        self._each("export", directory, self.tokenizer_from)

    def save(self, directory: str) -> None:
        """See :class:`seqkd.protocols.Learner`."""
        self._each("save", directory, check=lambda: None)  # never interrupted

    def restore(self, directory: str, policy_version: int) -> None:
        """See :class:`seqkd.protocols.Learner`."""
        self._each("restore", directory, policy_version)
        self.policy_version = policy_version

    def alive(self) -> None:
        """Raise LearnerLost if a rank is not alive."""
        self._results("heartbeat", [is_alive(rank) for rank in self.ranks])

    def _each(
        self, method: str, *arguments: Any, what: str = "", check: Callable[[], None] | None = None
    ) -> list[Any]:
        refs = [getattr(rank, method).remote(*arguments) for rank in self.ranks]
        return self._results(what or method, refs, check)

    def _results(
        self, what: str, refs: Sequence[Any], check: Callable[[], None] | None = None
    ) -> list[Any]:
        """Return the results of all ranks. Raises LearnerLost with the root cause if a rank is
        lost. The death of a rank takes precedence over the errors that it causes in others."""
        calls = Calls(f"learner {what}", self.control, check, starting=what == "start")
        for index, (rank, ref) in enumerate(zip(self.ranks, refs, strict=False)):
            calls.add(index, rank, ref)
        results: list[Any] = [None] * len(refs)
        failures: list[Failure] = []
        while calls.pending:
            ended = calls.next(SETTLE_S if failures else None)
            if ended is None:
                break
            index, result = ended
            if isinstance(result, Failure):
                failures.append(result)
            results[index] = result
        if failures:
            if any(failure.hung for failure in failures):
                kill_orphans([f"learner {index}" for index in range(len(self.ranks))])
            first = min(failures, key=lambda failure: (not failure.gone, not failure.for_the_user))
            raise first.cause if first.for_the_user else LearnerLost(first.cause, first.gone)
        return results

    def _shard(self, rollouts: Sequence[Rollout], scores: Scores) -> list[list[TrainBatch]]:
        """Return the micro-batches of each rank."""
        filler = min(rollouts, key=lambda r: len(r.prompt_ids) + len(r.completion_ids))
        return [
            [pack(micro_batch, scores, filler, self.layout) for micro_batch in part]
            for part in self._partition(rollouts, scores)
        ]

    def _partition(self, rollouts: Sequence[Rollout], scores: Scores) -> list[list[list[Rollout]]]:
        return partition(rollouts, scores, len(self.ranks), self.layout)


def _usage(pool: Pool) -> dict[str, int]:
    if not pool.paid:
        return {}
    return dict(sum(map(Counter, pool.each("usage")), Counter()))


def _seed(text: str) -> int:
    """Return a sampling seed for one prompt, independent between samplers, steps and prompts."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") >> 1
