"""A run to its end, whatever is lost on the way."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from seqkd import loop
from seqkd.checkpoint import Checkpoints, Progress
from seqkd.checks.alarms import StepAlarms
from seqkd.checks.canary import Canary
from seqkd.checks.monitor import Monitor
from seqkd.checks.preflight import Checked
from seqkd.config.run import Config
from seqkd.control import Control
from seqkd.errors import LearnerLost, LearningFault, SeqkdError
from seqkd.evaluation import summary
from seqkd.evaluation.heldout import HeldOut, Measurement
from seqkd.loop import Run
from seqkd.metrics import Recorder
from seqkd.run_journal import RunJournal
from seqkd.storage import run_reader
from seqkd.teachers.cache import TeacherCache, attach
from seqkd.workers import Workers


def prepare(
    directory: Path,
    config: Config,
    checked: Checked,
    workers: Workers,
    roles: Collection[str],
    journals: Mapping[str, TeacherCache],
    recorder: Recorder,
    control: Control,
) -> Run:
    """Everything that the loop works with; ``journals`` and the run's own are put before the
    teachers. What the teacher says of the held-out prompts is kept with the run, so that every
    measurement of it compares with the same."""
    canary = Canary(config, checked, workers, roles)
    attach(workers, config, checked, journals)
    evaluation = None
    if checked.heldout:
        keeping = replace(workers)
        if config.journal is None:
            kept = {
                name: TeacherCache(directory / "journal" / "heldout" / name, teacher.precision)
                for name, teacher in config.teachers.items()
            }
            attach(keeping, config, checked, kept)
        of = config.evaluation
        evaluation = HeldOut(
            keeping, checked.heldout, of.samples_per_prompt, config.seed, of.examples
        )
    journal = RunJournal(directory / "journal", config)
    checkpoints = Checkpoints(
        directory / "checkpoints",
        config,
        workers.learner,
        workers.teacher_samplers,
        journal,
        control,
    )
    journal.attach(workers, config, checked.vocabulary)
    watch = Monitor(
        canary,
        StepAlarms(config, checked.vocabulary),
        config.alarms.canary_every,
        recorder.note,
        directory / "skipped",
        list(journals.values()),
    )

    def publish(measured: Mapping[str, Measurement]) -> None:
        examples = config.evaluation.examples
        found = summary.evaluation_json(measured, checked.heldout, checked.tokenizer, examples)
        run_reader.write_evaluation(directory, found)

    return Run(
        config, workers, checked.train, checked.corpus, evaluation, recorder, checkpoints, watch,
        control, publish, str(directory / "student"),
    )  # fmt: skip


def finish(run: Run) -> dict[str, Measurement]:
    """From the newest checkpoint to the last measurement. Where the learner is lost, the run goes
    back to a checkpoint; where it has to stop, it is saved first."""
    raised = ""
    while True:
        progress = Progress()
        try:
            progress = _restored(run)
            return loop.go_on(run, progress)
        except LearnerLost as lost:
            raised = lost.again(raised)
            replace_learner(run.workers, run.control, lost)
        except LearningFault:
            # Neither what the student has become nor what was drawn is worth keeping.
            run.checkpoints.journal.forget()
            run.watch.revert()
            raise
        except SeqkdError:
            _save(run, progress)
            raise


def replace_learner(workers: Workers, control: Control, lost: LearnerLost) -> None:
    """New processes in the place of those that are lost, at the initial student."""
    control.restart("the learner", lost.cause)
    workers.learner.restart()
    workers.student.forget()


def _restored(run: Run) -> Progress:
    progress, skipped = run.checkpoints.restore()
    for line in (*skipped, *run.checkpoints.journal.dropped()):
        run.recorder.note(f"warning: {line}")
    run.watch.rewind(run.recorder.rewind(progress.step), progress.known_text)
    if progress.step:
        run.recorder.note(f"going on after step {progress.step}")
    return progress


def _save(run: Run, progress: Progress) -> None:
    try:
        if not run.checkpoints.save(progress):
            run.recorder.note(
                f"the last checkpoint is that of step {run.checkpoints.last_step}; the steps since "
                "then are taken again"
            )
    except SeqkdError as error:
        run.recorder.note(f"warning: no checkpoint could be written: {error}")
