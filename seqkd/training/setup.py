"""Construction of the objects that the training loop uses."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from seqkd.checks import preflight
from seqkd.checks.alarms import StepAlarms
from seqkd.checks.canary import Canary
from seqkd.checks.monitor import Monitor
from seqkd.checks.preflight import Checked
from seqkd.config.run import Config
from seqkd.evaluation import summary
from seqkd.evaluation.heldout import HeldOut, Measurement
from seqkd.evaluation.tasks import Tasks
from seqkd.models.model_files import identify
from seqkd.storage import run_directory, run_reader
from seqkd.teachers.cache import TeacherCache, open_caches, with_caches
from seqkd.training.checkpoint import Checkpoints
from seqkd.training.context import TrainingContext
from seqkd.training.control import Control
from seqkd.training.positions import ReplayPositions
from seqkd.training.precompute import check_recorded
from seqkd.training.recorder import Recorder
from seqkd.training.replay_log import FOLDER, ReplayLog
from seqkd.workers import Workers


def check(
    config: Config, resumed: Path | None = None
) -> tuple[Config, dict[str, TeacherCache], Checked]:
    """Run all checks that need no actors.

    ``resumed`` is the directory of a run that started with the same models before. Returns the
    configuration, in which recorded teachers replace teachers that are not loaded, the teacher
    caches by teacher name, and the objects that the checks loaded.
    """
    config, caches = open_caches(config, teacher_here=not config.two_step)
    if resumed:
        run_directory.refuse_other_models(resumed, identify_models(config))
    checked = preflight.check(config, teacher_here=not config.two_step)
    if config.two_step:
        check_recorded(config, caches, checked)
    return config, caches, checked


def identify_models(config: Config) -> dict[str, dict[str, Any]]:
    """Compute the digests of the files of the student and of all local teachers, by configuration
    key."""
    models = {"student.model": config.student.model}
    for name, teacher in config.teachers.items():
        if teacher.local:
            models[f"teacher.teachers.{name}.teacher.model" if name else "teacher.model"] = (
                teacher.model
            )
    return identify(models)


def prepare(
    directory: Path,
    config: Config,
    checked: Checked,
    actors: Workers,
    roles: Collection[str],
    caches: Mapping[str, TeacherCache],
    recorder: Recorder,
    control: Control,
) -> TrainingContext:
    """Return the objects that the training loop uses.

    ``caches`` and the run's replay log are put in front of ``actors``. The teacher's answers to the
    held-out prompts are stored with the run, so that all measurements compare with the same
    answers.
    """
    canary = Canary(config, checked, actors, roles)
    stop_ids, vocabulary = checked.stop_ids, checked.vocabulary
    cached = with_caches(actors, config, stop_ids, vocabulary, caches)
    log = ReplayLog(directory / FOLDER, config)
    workers = log.wrap(cached, config, vocabulary)
    samplers: Any = {name: cached.teacher_samplers[name] for name in caches}
    positions = ReplayPositions(samplers, log)
    evaluation = None
    if checked.heldout:
        # Reads are counted separately from training, so a restored run reads the same completions.
        kept = caches or {
            name: TeacherCache(directory / FOLDER / "heldout" / name, teacher.precision)
            for name, teacher in config.teachers.items()
        }
        measuring = with_caches(actors, config, stop_ids, vocabulary, kept)
        section = config.evaluation
        tasks = Tasks(section.tasks, checked.references, checked.decode)
        samples, shown = section.samples_per_prompt, section.examples
        evaluation = HeldOut(measuring, checked.heldout, samples, config.seed, shown, tasks)

    def publish(measured: Mapping[str, Measurement]) -> None:
        examples = config.evaluation.examples
        assert evaluation is not None
        figures = summary.evaluation_json(measured, evaluation.prompts, checked.tokenizer, examples)
        run_reader.write_evaluation(directory, figures)

    return TrainingContext(
        config=config,
        workers=workers,
        train=checked.train,
        corpus=checked.corpus,
        evaluation=evaluation,
        recorder=recorder,
        positions=positions,
        checkpoints=Checkpoints(
            directory / "checkpoints",
            run_directory.run_id(directory),
            config.checkpoints,
            workers.learner,
            positions,
            control,
        ),
        monitor=Monitor(
            canary,
            StepAlarms(config, vocabulary),
            config.alarms.canary_every,
            recorder.note,
            directory / "skipped",
            list(caches.values()),
        ),
        control=control,
        publish=publish,
        export_to=str(directory / "student"),
    )
