"""The training loop, top to bottom."""

from __future__ import annotations

from seqkd.evaluation.heldout import Measurement
from seqkd.training.checkpoint import Progress
from seqkd.training.context import PhaseSpan, TrainingContext, phase_spans
from seqkd.training.feed import RolloutFeed
from seqkd.training.step_metrics import step_metrics


def run_phases(run: TrainingContext, progress: Progress) -> dict[str, Measurement]:
    """Train through every phase from where ``progress`` stands, and keep it up to date. Return the
    held-out measurements by the stage that each followed, "initial" first."""
    measure(run, progress, "initial", "measuring the initial student on held-out prompts")
    for span in phase_spans(run.config):
        if progress.step < span.end:
            train_phase(run, progress, span)
        if progress.step <= span.end:
            save(run, progress)
            run.workers.learner.export(run.export_to)
            note = f"measuring the student after {span.name} on held-out prompts"
            measure(run, progress, span.name, note)
    return progress.measured


def train_phase(run: TrainingContext, progress: Progress, span: PhaseSpan) -> None:
    """Take the steps of one phase that are not taken yet."""
    run.recorder.begin(span.name, span.config)
    with RolloutFeed(run, span, progress) as feed:
        while feed.wait(progress.step):
            if feed.between_draws:
                with feed.clock.stopped():
                    evaluate_if_due(run, progress, span)
                run.control.check()
                if run.checkpoints.due(progress):
                    save(run, progress)
            batch = feed.next(progress.step)
            with batch.clock("watch"):
                run.monitor.after_sampling(progress.step, batch.probe)
            feed.prefetch(progress.step)
            with batch.clock("learn"):
                result = run.workers.learner.step(batch.parts, batch.lr)
            run.monitor.after_step(progress.step, batch.parts, result, batch.lr)
            metrics = step_metrics(
                run.config, span.name, span.config, batch.policy_version, batch.lr, batch.parts,
                result,
            )  # fmt: skip
            costs = feed.update(batch, result)
            expected = span.first + feed.horizon(progress.step + 1)
            run.recorder.step(progress.step, metrics, costs, batch.clock, expected)
            run.monitor.after_metrics(metrics)
            progress.step += 1


def evaluate_if_due(run: TrainingContext, progress: Progress, span: PhaseSpan) -> None:
    """Measure the student within a phase, every ``evaluation.every_steps`` steps."""
    interval = run.config.evaluation.every_steps
    if interval and progress.step > span.first and progress.step % interval == 0:
        measure(run, progress, f"step {progress.step}", "measuring on held-out prompts")


def save(run: TrainingContext, progress: Progress) -> None:
    """Write a checkpoint of a learner whose outputs are finite."""
    run.monitor.before_checkpoint()
    run.write_checkpoint(progress)


def measure(run: TrainingContext, progress: Progress, stage: str, note: str) -> None:
    """Measure the current student on held-out prompts, unless that was done before."""
    if run.evaluation and stage not in progress.measured:
        run.recorder.wait(note)
        progress.measured[stage] = run.evaluation.measure()
        run.recorder.held_out(progress.step, progress.measured[stage])
        run.publish(progress.measured)
