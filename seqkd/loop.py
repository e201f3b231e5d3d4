"""The run, top to bottom."""

from __future__ import annotations

from collections.abc import Sequence

from seqkd.config import Config, Phase
from seqkd.data import PromptStream
from seqkd.evaluation.divergence import HeldOut, Measurement
from seqkd.metrics import Clock, Recorder, describe
from seqkd.protocols import Learner, Scores, Workers
from seqkd.rate import RunningRate
from seqkd.schedule import learning_rate
from seqkd.types import Prompt, Rollout


def run(
    config: Config,
    workers: Workers,
    train: Sequence[Prompt],
    heldout: Sequence[Prompt],
    recorder: Recorder,
) -> dict[str, Measurement]:
    """Train through every phase; returns held-out measurements by the name of what preceded
    them, "initial" first."""
    stream = PromptStream(train, config.seed)
    evaluation = None
    measurements = {}
    if heldout:
        recorder.note("measuring the initial student on held-out prompts")
        evaluation = HeldOut(workers, heldout, config.evaluation.samples_per_prompt, config.seed)
        measurements["initial"] = evaluation.measure()
    step = 0
    for name, phase in config.phases:
        recorder.begin(name, phase)
        rate = RunningRate()
        for index in range(phase.steps):
            clock = Clock()
            version = workers.learner.policy_version
            prompts = stream.take(phase.prompts_per_step)
            rollouts = draw(config, phase, workers, prompts, step, clock)
            with clock("score"):
                needed = phase.objective.teacher_need != "nothing"
                scores = workers.teacher.score(rollouts) if needed else {}
            with clock("learn"):
                if phase.objective.needs_rate and not rate.known:
                    rate.update(first_sums(workers.learner, rollouts, scores))
                counts = rate.counts(rollouts)
                lr = learning_rate(config.learner, config.lr(phase), index, phase.steps)
                result = workers.learner.step(rollouts, scores, counts, phase.objective, lr)
                rate.update(result.sums)
            row = describe(config, name, phase, version, lr, counts, rollouts, result)
            recorder.step(step, row, clock)
            step += 1
        if evaluation:
            recorder.note(f"measuring the student after {name} on held-out prompts")
            measurements[name] = evaluation.measure()
    return measurements


def draw(
    config: Config,
    phase: Phase,
    workers: Workers,
    prompts: Sequence[Prompt],
    step: int,
    clock: Clock,
) -> list[Rollout]:
    """The step's completions, from whom the phase's sampler names."""
    if phase.sampler == "dataset":
        return [from_reference(prompt) for prompt in prompts]
    if phase.sampler == "student":
        with clock("sync"):
            workers.sync()
    with clock("sample"):
        sampler = workers.student if phase.sampler == "student" else workers.teacher_sampler
        # Held-out prompts are drawn with the bare seed; training never repeats it.
        seed = (config.seed + 1) * 1_000_003 + step
        samples, rollout = config.samples_per_prompt(phase), config.rollout
        return sampler.sample(prompts, samples, seed, rollout.temperature, rollout.top_p)


def from_reference(prompt: Prompt) -> Rollout:
    """The data set's own answer as a completion."""
    assert prompt.reference_ids is not None
    return Rollout(
        prompt_id=prompt.prompt_id,
        sample_id=f"{prompt.prompt_id}/reference",
        prompt_ids=prompt.token_ids,
        completion_ids=prompt.reference_ids,
        rollout_logprobs=None,
        source="dataset",
        policy_version=0,
        finish_reason="stop",
    )


def first_sums(learner: Learner, rollouts: Sequence[Rollout], scores: Scores) -> dict[str, float]:
    """Sums of the first batch of a phase, which has no past batch to estimate its rate from."""
    measured = learner.measure(rollouts, scores).values()
    sums: dict[str, float] = {}
    for values in measured:
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value
    lengths = sum(len(r.completion_ids) for r in rollouts)
    return sums | {"tokens": float(lengths), "sequences": float(len(rollouts))}
