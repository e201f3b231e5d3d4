"""Construct everything that the loop works with."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from seqkd.checks.alarms import StepAlarms
from seqkd.checks.canary import Canary
from seqkd.checks.monitor import Monitor
from seqkd.checks.preflight import Checked
from seqkd.config.run import Config
from seqkd.evaluation import summary
from seqkd.evaluation.heldout import HeldOut, Measurement
from seqkd.storage import run_reader
from seqkd.teachers.cache import TeacherCache, attach
from seqkd.training.checkpoint import Checkpoints
from seqkd.training.control import Control
from seqkd.training.loop import TrainingContext
from seqkd.training.recorder import Recorder
from seqkd.training.replay_log import ReplayLog
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
) -> TrainingContext:
    """Everything that the loop works with; ``journals`` and the run's own are put before the
    teachers. What the teacher says of the held-out prompts is kept with the run, so that every
    measurement of it compares with the same."""
    canary = Canary(config, checked, workers, roles)
    attach(workers, config, checked.stop_ids, checked.vocabulary, journals)
    evaluation = None
    if checked.heldout:
        keeping = replace(workers)
        if config.journal is None:
            kept = {
                name: TeacherCache(directory / "journal" / "heldout" / name, teacher.precision)
                for name, teacher in config.teachers.items()
            }
            attach(keeping, config, checked.stop_ids, checked.vocabulary, kept)
        of = config.evaluation
        evaluation = HeldOut(
            keeping, checked.heldout, of.samples_per_prompt, config.seed, of.examples
        )
    journal = ReplayLog(directory / "journal", config)
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

    return TrainingContext(
        config, workers, checked.train, checked.corpus, evaluation, recorder, checkpoints, watch,
        control, publish, str(directory / "student"),
    )  # fmt: skip
