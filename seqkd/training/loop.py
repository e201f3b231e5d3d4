"""The run, top to bottom."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

from seqkd.checks.monitor import Monitor
from seqkd.config.phases import PhaseConfig
from seqkd.config.run import Config
from seqkd.data.stream import PromptStream
from seqkd.evaluation.heldout import HeldOut, Measurement
from seqkd.training.budget import cost, expected_steps, spend
from seqkd.training.checkpoint import Checkpoints, Progress
from seqkd.training.clock import Clock
from seqkd.training.control import Control
from seqkd.training.lr_schedule import learning_rate
from seqkd.training.prefetch import RolloutPrefetcher, prompts_of
from seqkd.training.recorder import Recorder
from seqkd.training.rollouts import RolloutSource
from seqkd.training.step_metrics import describe
from seqkd.types import Prompt
from seqkd.workers import Workers


@dataclass(frozen=True)
class TrainingContext:
    """What a run works with."""

    config: Config
    workers: Workers
    train: Sequence[Prompt]
    corpus: Sequence[Prompt]
    evaluation: HeldOut | None
    recorder: Recorder
    checkpoints: Checkpoints
    watch: Monitor
    control: Control
    publish: Callable[[Mapping[str, Measurement]], None]
    """What is done with all that was measured so far, after each measurement."""
    export_to: str
    """Where each phase leaves its student."""


def run_phases(run: TrainingContext, progress: Progress) -> dict[str, Measurement]:
    """Train through every phase from where ``progress`` stands, which is kept up to date; returns
    held-out measurements by the name of what preceded them, "initial" first."""
    stream = PromptStream(run.train, run.config.seed)
    texts = PromptStream(run.corpus, run.config.seed)
    measure(run, progress, "initial", "measuring the initial student on held-out prompts")
    begun = 0
    for name, phase in run.config.phases:
        train(run, progress, name, phase, begun, stream, texts)
        begun += phase.steps
        if progress.step <= begun:
            save(run, progress)
            run.workers.learner.export(run.export_to)
            measure(run, progress, name, f"measuring the student after {name} on held-out prompts")
            progress.running = {}
    return progress.measured


def train(
    run: TrainingContext, progress: Progress, name: str, phase: PhaseConfig, begun: int,
    stream: PromptStream, texts: PromptStream,
) -> None:  # fmt: skip
    """Take the steps of one phase that are not taken yet, the first of them step ``begun``."""
    config, learner = run.config, run.workers.learner
    done = min(progress.step - begun, phase.steps)
    prompts = prompts_of(phase, stream, texts, done)
    if done == phase.steps:
        return
    run.recorder.begin(name, phase)
    sources = [
        RolloutSource(config, phase, sampler, run.workers, progress.running.get(sampler))
        for sampler in phase.by_sampler
    ]
    progress.running = {source.sampler: source.running for source in sources}
    with closing(
        RolloutPrefetcher(sources, prompts, run.workers, run.checkpoints, run.watch)
    ) as draws:
        for index in range(done, phase.steps):
            clock = Clock()
            steps = expected_steps(config, phase, index, progress.spent)
            if progress.between_draws:
                with clock("sample"):
                    draws.wait()
                if index >= steps:
                    break  # what was begun beside the step that spent the budget is dropped
                if index and progress.step % (config.evaluation.every_steps or math.inf) == 0:
                    stage = f"step {progress.step}"
                    with clock.stopped():
                        measure(run, progress, stage, "measuring on held-out prompts")
                run.control.check()
                if run.checkpoints.due(progress):
                    save(run, progress)
                asked = draws.take(progress.step, clock)
                with clock("watch"):
                    run.watch.drawn(progress.step, asked)
                following = draws.steps_left
                if config.draws_ahead(phase) and index + following < steps:
                    draws.begin(progress.step + following, clock)
            steps = max(steps, index + 1)  # what is drawn is learnt from, whatever it cost
            version = learner.policy_version
            parts = [source.part(clock) for source in sources]
            lr = learning_rate(config.learner, config.lr(phase), index, steps)
            with clock("learn"):
                result = learner.step(parts, lr)
            run.watch.learnt(progress.step, parts, result, lr)
            for source, learnt in zip(sources, result.parts, strict=True):
                if not result.skipped:
                    source.running.update(learnt.costs, learnt.alive)
            row = describe(config, name, phase, version, lr, parts, result)
            costs = cost(phase, parts, clock.total())
            spend(progress.spent, name, costs)
            steps = max(index + 1, expected_steps(config, phase, index + 1, progress.spent))
            run.recorder.step(progress.step, row, costs, clock, begun + steps)
            run.watch.described(row)
            progress.step += 1
            progress.between_draws = not draws.steps_left
            if progress.between_draws:
                draws.learnt()


def save(run: TrainingContext, progress: Progress) -> None:
    """Write a checkpoint of a learner that is whole."""
    run.watch.saving()
    run.checkpoints.save(progress)


def measure(run: TrainingContext, progress: Progress, stage: str, note: str) -> None:
    """Measure the student as it is, unless that is done."""
    if run.evaluation and stage not in progress.measured:
        run.recorder.note(note)
        progress.measured[stage] = run.evaluation.measure()
        run.recorder.held_out(progress.step, progress.measured[stage])
        run.publish(progress.measured)
