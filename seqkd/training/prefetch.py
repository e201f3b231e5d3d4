"""What the learner is given, one draw after the other: each of prompts for one or more steps, their
completions and scores. Where it is allowed, the next one is drawn while the learner is at work."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from seqkd.checks.canary import ProbeResponses
from seqkd.checks.monitor import Monitor
from seqkd.config.base import SamplerName
from seqkd.config.phases import PhaseConfig
from seqkd.data.stream import PromptStream
from seqkd.training.checkpoint import Checkpoints
from seqkd.training.clock import Clock
from seqkd.training.rollouts import RolloutSource, ScoredRollouts
from seqkd.types import Prompt
from seqkd.workers import Workers

Batches = dict[SamplerName, list[list[Prompt]]]
"""By sampler, a list of prompts for every step that learns from one draw."""


Draw = tuple[list[ScoredRollouts], ProbeResponses | None]
"""For every source; and what was then asked of the known text."""


def prompts_of(
    phase: PhaseConfig, stream: PromptStream, texts: PromptStream, done: int = 0
) -> Iterator[Batches]:
    """The prompts of each draw of ``phase``. ``stream`` and ``texts`` go on from where they are,
    past those of the ``done`` steps."""
    rows = {sampler: texts if sampler == "corpus" else stream for sampler in phase.by_sampler}
    for of in rows.values():
        of.skip(done * phase.prompts_per_step)

    def draw(first: int) -> Batches:
        steps = range(min(phase.updates_per_rollout, phase.steps - first))
        return {s: [of.take(phase.prompts_per_step) for _ in steps] for s, of in rows.items()}

    return map(draw, range(done, phase.steps, phase.updates_per_rollout))


class RolloutPrefetcher:
    """The draws of one phase, in order; to be closed."""

    def __init__(
        self,
        sources: Sequence[RolloutSource],
        prompts: Iterator[Batches],
        workers: Workers,
        checkpoints: Checkpoints,
        watch: Monitor,
    ) -> None:
        self.sources, self.prompts = sources, prompts
        self.workers, self.checkpoints, self.watch = workers, checkpoints, watch
        self.under_way: Future[tuple[Draw, Clock]] | None = None
        self.thread = ThreadPoolExecutor(1)

    def close(self) -> None:
        """Wait for what is under way."""
        self.thread.shutdown()

    def begin(self, step: int, clock: Clock) -> None:
        """Draw what ``step`` and those after it learn from, with the learner's weights as they are
        now, beside whatever it does next."""
        with clock("watch"):
            self.watch.ahead(step)
        draw = self._next(step, clock)

        def timed() -> tuple[Draw, Clock]:
            beside = Clock()
            drawn = draw(beside)
            beside.stop()
            return drawn, beside

        self.under_way = self.thread.submit(timed)

    def wait(self) -> None:
        """Until nothing is under way; before that no one else may ask the samplers or teachers, or
        publish. Raises what ended it: another engine may still be loading what was published."""
        if self.under_way is not None:
            self.under_way.result()

    def take(self, step: int, clock: Clock) -> ProbeResponses | None:
        """Give every source what was begun, or what is drawn now; and what was then asked of the
        known text."""
        if self.under_way is None:
            drawn, asked = self._next(step, clock)(clock)
        else:
            (drawn, asked), beside = self.under_way.result()
            clock.ahead, self.under_way = beside.total(), None
        for source, given in zip(self.sources, drawn, strict=True):
            source.drawn = given
        return asked

    @property
    def steps_left(self) -> int:
        """How many more steps learn from what was taken."""
        return len(self.sources[0].drawn.steps)

    def learnt(self) -> None:
        """All of them are taken."""
        self.checkpoints.unlearnt.pop(0)

    def _next(self, step: int, clock: Clock) -> Callable[[Clock], Draw]:
        """The next draw. What it needs of the learner is done; the rest may be done beside it."""
        self.checkpoints.unlearnt.append(self.checkpoints.place())
        batches, version = next(self.prompts), self.workers.learner.policy_version
        weights = None
        if any(source.asks_student for source in self.sources):
            with clock("sync"):
                weights = self.workers.publish()

        def draw(clock: Clock) -> Draw:
            if weights:
                with clock("sync"):
                    self.workers.student.load(weights)
            drawn = [s.draw(batches[s.sampler], step, clock) for s in self.sources]
            with clock("watch"):
                return drawn, self.watch.ask(step, version)

        return draw
