"""The run, top to bottom."""

from __future__ import annotations

from collections.abc import Sequence

from seqkd.config import Config
from seqkd.data import PromptStream
from seqkd.evaluation.divergence import HeldOut, Measurement
from seqkd.metrics import Clock, Recorder, describe
from seqkd.schedule import learning_rate
from seqkd.sources import StepSource, draws
from seqkd.types import Prompt
from seqkd.workers import Workers


def run(
    config: Config,
    workers: Workers,
    train: Sequence[Prompt],
    heldout: Sequence[Prompt],
    corpus: Sequence[Prompt],
    recorder: Recorder,
    export_to: str,
) -> dict[str, Measurement]:
    """Train through every phase, each of which leaves its student at ``export_to``; returns
    held-out measurements by the name of what preceded them, "initial" first."""
    stream, texts = PromptStream(train, config.seed), PromptStream(corpus, config.seed)
    evaluation = None
    measurements = {}
    if heldout:
        recorder.note("measuring the initial student on held-out prompts")
        evaluation = HeldOut(workers, heldout, config.evaluation.samples_per_prompt, config.seed)
        measurements["initial"] = evaluation.measure()
    step = 0
    for name, phase in config.phases:
        recorder.begin(name, phase)
        prompts = draws(phase, stream, texts)
        sources = [StepSource(config, phase, sampler, workers) for sampler in phase.by_sampler]
        for index in range(phase.steps):
            clock = Clock()
            version = workers.learner.policy_version
            if index % phase.updates_per_rollout == 0:
                drawn = next(prompts)
                for source in sources:
                    source.draw(drawn[source.sampler], step, clock)
            parts = [source.part(clock) for source in sources]
            lr = learning_rate(config.learner, config.lr(phase), index, phase.steps)
            with clock("learn"):
                result = workers.learner.step(parts, lr)
            for source, learnt in zip(sources, result.parts, strict=True):
                source.running.update(learnt.costs, learnt.alive)
            recorder.step(step, describe(config, name, phase, version, lr, parts, result), clock)
            step += 1
        workers.learner.export(export_to)
        if evaluation:
            recorder.note(f"measuring the student after {name} on held-out prompts")
            measurements[name] = evaluation.measure()
    return measurements
