"""Feed of the learner: one batch of scored completions per optimizer step.

If the configuration allows it, the next draw runs in parallel with the learner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from seqkd.checks.canary import ProbeResponses
from seqkd.config.run import Config
from seqkd.config.samplers import SAMPLERS, SamplerName
from seqkd.data.stream import PromptStream
from seqkd.learner.running_costs import RunningCosts
from seqkd.protocols import Part
from seqkd.training.budget import Cost, cost, expected_steps, spend
from seqkd.training.checkpoint import Progress
from seqkd.training.clock import Clock
from seqkd.training.context import PhaseSpan, TrainingContext, phase_spans
from seqkd.training.lr_schedule import learning_rate
from seqkd.training.rollouts import RolloutSource, ScoredRollouts
from seqkd.types import Prompt, StepResult

PromptBatches = dict[SamplerName, list[list[Prompt]]]
"""Prompts of the steps that train on one draw, by sampler."""


@dataclass(frozen=True)
class Draw:
    """Completions and scores for one or more consecutive steps, sampled together."""

    first: int
    """Number of the first step."""
    rollouts: dict[SamplerName, ScoredRollouts]
    steps: int
    probe: ProbeResponses | None
    """Answers to the probe at the end of the draw, or None if the probe was not due."""


@dataclass(frozen=True)
class Batch:
    """Training data of one optimizer step."""

    parts: tuple[Part, ...]
    """One part per sampler of the phase, in order."""
    lr: float
    policy_version: int
    """Version of the learner's weights before the step."""
    probe: ProbeResponses | None
    """Probe of the draw for the first step that trains on it, else None."""
    last_of_draw: bool
    clock: Clock


class RolloutFeed:
    """Batches of one phase from ``progress`` on. Use it as a context manager.

    The feed is responsible for weight sync, sampling, scoring and prefetch. It is the only writer
    of :attr:`seqkd.training.checkpoint.Progress.feed`: running costs, spent budget, and positions
    of the draws that were not trained on yet.
    """

    def __init__(self, run: TrainingContext, span: PhaseSpan, progress: Progress) -> None:
        self.run, self.span, self.state = run, span, progress.feed
        if progress.step == span.first:
            self.state.running.clear()  # from the previous phase
        samplers = span.config.by_sampler
        self.sources = [RolloutSource(run.config, span.config, s, run.workers) for s in samplers]
        for sampler in samplers:
            self.state.running.setdefault(sampler, RunningCosts())
        self.prompts = prompt_batches(
            run.config, span, PromptStream(run.train, run.config.seed),
            PromptStream(run.corpus, run.config.seed), progress.step - span.first,
        )  # fmt: skip
        self.clock = Clock()
        """Clock of the current step."""
        self.ahead: Future[tuple[Draw, Clock]] | None = None
        self.thread = ThreadPoolExecutor(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait for the running draw."""
        self.thread.shutdown()

    def wait(self, step: int) -> bool:
        """Wait for the draw that runs in parallel with the learner, if ``step`` starts a new draw.
        Returns True if the phase and its budget have a step left.

        Raises the error of that draw. Do not publish weights before this method returns, because an
        engine may still be loading the previous weights.
        """
        self.clock = Clock()
        if self.between_draws and self.ahead is not None:
            with self.clock("sample"):
                self.ahead.result()
        return step - self.span.first < self.horizon(step)

    @property
    def between_draws(self) -> bool:
        """True if the next step begins with a new draw."""
        return not self.state.mid_draw

    def next(self, step: int) -> Batch:
        """Return the batch of ``step``."""
        if self.between_draws:
            self.draw = self._take(step)
        index = step - self.draw.first
        version = self.run.workers.learner.policy_version
        parts = tuple(self._part(source, index) for source in self.sources)
        config, taken = self.run.config, step - self.span.first
        lr = learning_rate(config.learner, config.lr(self.span.config), taken, self.horizon(step))
        probe = None if index else self.draw.probe
        return Batch(parts, lr, version, probe, index == self.draw.steps - 1, self.clock)

    def prefetch(self, step: int) -> None:
        """Start the next draw with the learner's current weights, in parallel with the learner.
        Does nothing if the configuration does not allow it or the phase ends before that draw."""
        following = self.draw.first + self.draw.steps
        if not (
            self.between_draws
            and self.run.config.draws_ahead(self.span.config)
            and following < self.span.first + self.horizon(step)
        ):
            return
        with self.clock("watch"):
            self.run.monitor.before_prefetch(following)
        draw = self._begin(following, self.clock)

        def timed() -> tuple[Draw, Clock]:
            clock = Clock()
            finished = draw(clock)
            clock.stop()
            return finished, clock

        self.ahead = self.thread.submit(timed)

    def update(self, batch: Batch, result: StepResult) -> Cost:
        """Update running costs, budget and positions after a step, and return its cost."""
        if not result.skipped:
            for source, part in zip(self.sources, result.parts, strict=True):
                self.state.running[source.sampler].update(part.costs, part.survival)
        costs = cost(self.span.config, batch.parts, batch.clock.total())
        spend(self.state.spent, self.span.name, costs)
        self.state.mid_draw = not batch.last_of_draw
        if batch.last_of_draw:
            self.state.pending.pop(0)
        return costs

    def horizon(self, step: int) -> int:
        """Estimate the number of steps of the phase from the cost of the steps before ``step``. All
        steps of a draw are taken, even if they exceed the budget."""
        taken = step - self.span.first
        steps = expected_steps(self.run.config, self.span.config, taken, self.state.spent)
        return max(steps, taken + 1) if self.state.mid_draw else steps

    def _part(self, source: RolloutSource, index: int) -> Part:
        drawn, running = self.draw.rollouts[source.sampler], self.state.running[source.sampler]
        rollouts, masked, skipped = source.split(drawn.steps[index], drawn.scores)
        scores = {r.sample_id: drawn.scores[r.sample_id] for r in rollouts} if drawn.scores else {}
        if source.needs_costs and not running.known:
            # The first batch of a phase has no earlier batch to estimate costs from, so it is
            # measured itself.
            with self.clock("learn"):
                running.update(*source.costs(rollouts, scores))
        return Part(
            rollouts, scores, running.counts(rollouts), source.terms, source.fraction, drawn.usage,
            masked, skipped,
        )  # fmt: skip

    def _take(self, step: int) -> Draw:
        if self.ahead is None:
            return self._begin(step, self.clock)(self.clock)
        (draw, clock), self.ahead = self.ahead.result(), None
        self.clock.ahead = clock.total()
        return draw

    def _begin(self, step: int, clock: Clock) -> Callable[[Clock], Draw]:
        """Do the part of the draw for ``step`` that needs the learner. Returns a function for the
        rest, which may run in parallel with the learner."""
        workers, monitor = self.run.workers, self.run.monitor
        self.state.pending.append(self.run.positions.current())
        prompts, version = next(self.prompts), workers.learner.policy_version
        weights = None
        if any(source.asks_student for source in self.sources):
            with clock("sync"):
                weights = workers.publish()

        def draw(clock: Clock) -> Draw:
            if weights:
                with clock("sync"):
                    workers.student.load(weights)
            rollouts = {s.sampler: s.draw(prompts[s.sampler], step, clock) for s in self.sources}
            with clock("watch"):
                probe = monitor.probe(step, version)
            return Draw(step, rollouts, len(prompts[self.span.config.sampler]), probe)

        return draw


def prompt_batches(
    config: Config, span: PhaseSpan, train: PromptStream, corpus: PromptStream, done: int = 0
) -> Iterator[PromptBatches]:
    """Return the prompts of each draw of a phase after its first ``done`` steps. The streams must
    be at the start of the run."""
    for other in phase_spans(config):
        steps = done if other.first == span.first else other.config.steps
        for sampler in other.config.by_sampler if other.first <= span.first else ():
            stream = corpus if SAMPLERS[sampler].plain_text else train
            stream.skip(steps * other.config.prompts_per_step)
    phase = span.config
    streams = {s: corpus if SAMPLERS[s].plain_text else train for s in phase.by_sampler}

    def draw(first: int) -> PromptBatches:
        steps = range(min(phase.updates_per_rollout, phase.steps - first))
        return {
            s: [stream.take(phase.prompts_per_step) for _ in steps] for s, stream in streams.items()
        }

    return map(draw, range(done, phase.steps, phase.updates_per_rollout))
