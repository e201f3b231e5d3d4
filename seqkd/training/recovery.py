"""Run with recovery from lost processes."""

from __future__ import annotations

from seqkd.errors import LearnerLost, LearningFault, SeqkdError
from seqkd.evaluation.heldout import Measurement
from seqkd.training.checkpoint import Progress
from seqkd.training.context import TrainingContext
from seqkd.training.control import Control
from seqkd.training.loop import run_phases
from seqkd.workers import Workers


def finish(run: TrainingContext) -> dict[str, Measurement]:
    """Run from the newest checkpoint to the last measurement. If the learner is lost, the run
    continues from a checkpoint. If the run must stop, a checkpoint is written first."""
    raised = ""
    while True:
        progress = Progress()
        try:
            progress = _restored(run)
            return run_phases(run, progress)
        except LearnerLost as lost:
            raised = lost.raise_if_repeated(raised)
            replace_learner(run.workers, run.control, lost)
        except LearningFault:
            # The student and the samples since the checkpoint may be corrupt, so no checkpoint is
            # written.
            run.positions.log.clear()
            run.monitor.rollback()
            raise
        except SeqkdError:
            _save(run, progress)
            raise


def replace_learner(workers: Workers, control: Control, lost: LearnerLost) -> None:
    """Replace all processes of a lost learner. The new ones start from the initial student."""
    control.restart("the learner", lost.cause)
    workers.learner.restart()
    workers.student.mark_stale()


def _restored(run: TrainingContext) -> Progress:
    progress, baseline, skipped = run.checkpoints.restore()
    for line in (*skipped, *run.positions.log.dropped()):
        run.recorder.note(f"warning: {line}")
    run.monitor.rewind(run.recorder.rewind(progress.step), baseline)
    if progress.step:
        run.recorder.note(f"resuming after step {progress.step}")
    return progress


def _save(run: TrainingContext, progress: Progress) -> None:
    try:
        if not run.write_checkpoint(progress):
            run.recorder.note(
                f"the last checkpoint is at step {run.checkpoints.last_step}; later steps will be "
                "repeated"
            )
    except SeqkdError as error:
        run.recorder.note(f"warning: no checkpoint could be written: {error}")
