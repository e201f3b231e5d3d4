"""Train a student: check, distill, evaluate, export, report."""

from __future__ import annotations

import argparse
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from seqkd.cli.arguments import add_config, add_verbose
from seqkd.console import print_message, quiet, run_command, show
from seqkd.errors import LearnerLost, StorageError
from seqkd.imports import importing

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from seqkd.checks.preflight import Checked
    from seqkd.config.run import Config
    from seqkd.evaluation.heldout import Measurement
    from seqkd.evaluation.intervals import Interval
    from seqkd.teachers.cache import TeacherCache
    from seqkd.training.recorder import Recorder


@dataclass(frozen=True)
class RunResult:
    """Files and held-out figures of a finished run."""

    directory: Path
    """The run directory."""
    student: Path
    """The exported student: a Hugging Face model directory with its tokenizer."""
    metrics: Path
    """``metrics.jsonl``: one JSON object per optimizer step."""
    report: Path | None
    """The HTML report, or None if it could not be written."""
    figures: Mapping[str, Mapping[str, Interval]]
    """Held-out figures with their 95 % intervals, by stage ("initial", then the name of each
    phase), then by the names in docs/metrics.md. Empty if ``evaluation.prompts`` is 0."""
    warnings: Sequence[str]
    """Warnings about the student, such as a completion length that is significantly away from the
    teacher's. The divergences in ``figures`` do not show it."""
    steps: int
    """Optimizer steps of the run, including those before it was resumed."""
    seconds: float
    """Wall-clock time of this call."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``seqkd train``."""
    parser.epilog = "Example: seqkd train configs/tiny.yaml sampler=teacher steps=5"
    add_config(parser, "YAML file (see configs/)", "learner.lr=1e-5")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved configuration, the plan and all findings, and exit",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue from the newest checkpoint of the run, or start it if there is none",
    )
    add_verbose(parser)


def run(args: argparse.Namespace) -> int:
    """Run ``seqkd train``."""

    def action() -> int:
        from seqkd.config.run import load

        config = load(args.config, args.overrides)
        if args.dry_run:
            quiet()
            from seqkd.cli.dry_run import dry_run

            return dry_run(config, args.resume)
        train(config, resume=args.resume, verbose=args.verbose)
        return 0

    return run_command(action, "continue with --resume")


def train(config: Config, *, resume: bool = False, verbose: bool = False) -> RunResult:
    """Train, evaluate and export the student of ``config``, and return the result of the run.

    The function blocks until the run is over, and prints the same lines as ``seqkd train``. Unless
    a cluster is configured, it starts a local Ray for the duration of the run. On SIGINT or SIGTERM
    it writes a checkpoint before it raises Stopped. Call it from the main thread.

    Args:
        config: The configuration, from :func:`seqkd.load_config`.
        resume: Continue from the newest checkpoint of the run, or start it if there is none.
        verbose: Print the libraries' logs.

    Raises:
        SeqkdError: Base class of the errors below. Its string is the whole message.
        ConfigError: The configuration, models and data do not fit together, or the run directory
            contains another run.
        ResourceError: The machine or the cluster has too few cores, GPUs or memory.
        ActorError: An actor failed more often than ``recovery.restarts`` allows.
        LearningFault: An invariant was violated during training.
        Stopped: A signal stopped the run. Call the function with ``resume=True`` to continue.
    """
    from seqkd.storage import run_directory

    start = time.perf_counter()
    directory = run_directory.locate(config)
    with importing():
        if not verbose:
            quiet()  # before the imports below, during which some libraries print notices
        from seqkd import report
        from seqkd.evaluation import summary
        from seqkd.report import model_card
        from seqkd.storage import run_reader

    # Locked before the data is prepared, so that a second run of this name ends at once.
    with run_directory.lock(directory):
        measured, recorder = check_and_learn(directory, config, resume, verbose)
    evaluation = run_reader.read_evaluation(directory) if measured else None
    if evaluation:
        show("", *summary.render(evaluation))
    model_card.write(directory, config, evaluation)
    page: Path | None = directory / "report.html"
    try:
        report.write([directory], directory / "report.html")
    except StorageError as error:  # a warning, because the run itself is complete
        print_message("warning", str(error))
        page = None
    seconds = time.perf_counter() - start
    show("\n" + summary.closing(directory, recorder.stage_seconds, seconds))
    finished = run_reader.read(directory)
    figures = {stage: intervals for stage, (_, intervals) in finished.figures.items()}
    return RunResult(
        directory, directory / "student", directory / "metrics.jsonl", page, figures,
        finished.warnings, finished.done, seconds,
    )  # fmt: skip


def check_and_learn(
    directory: Path, config: Config, resume: bool, verbose: bool
) -> tuple[dict[str, Measurement], Recorder]:
    """Check everything that needs no actors, connect to Ray and call :func:`learn`. Returns the
    held-out measurements by stage and the closed recorder."""
    from actors import build
    from seqkd.cli.dry_run import check_machine, memory_warnings
    from seqkd.storage import run_directory
    from seqkd.training import replay_log, trackers
    from seqkd.training.recorder import Recorder
    from seqkd.training.setup import check, identify_models

    trackers.check(config.trackers)
    resumption = run_directory.resumption(directory, config, resume)
    check_machine(config)  # both before the data is prepared
    build.reach(config)
    resolved, caches, checked = check(config, directory if resumption.exists else None)
    for warning in (*checked.warnings, *memory_warnings(resolved, checked)):
        print_message("warning", warning)
    data = {"training": checked.train, "held-out": checked.heldout, "corpus": checked.corpus}
    if resumption.exists:
        run_directory.refuse_other_data(directory, data)
        for line in resumption.changes:
            show(f"changed: {line}")
    elif resume:
        show(f"--resume: {directory} contains no run yet; starting it")
    models = None if resumption.exists else identify_models(resolved)
    with build.connect(resolved, verbose):
        build.check_resources(resolved)
        with closing(Recorder(directory, resolved)) as recorder:
            replay_log.discard(directory / replay_log.FOLDER, resumption)
            run_directory.initialize(directory, config, data, models)
            recorder.note(f"run directory: {directory}")
            recorder.wait("starting the actors (normally 20 to 120 s)")
            return learn(directory, resolved, checked, caches, recorder), recorder


def learn(
    directory: Path,
    config: Config,
    checked: Checked,
    caches: dict[str, TeacherCache],
    recorder: Recorder,
) -> dict[str, Measurement]:
    """Start and check the actors, train, and return the held-out measurements by stage."""
    from actors import build, placement
    from seqkd.checks.startup import check_workers
    from seqkd.models.export import materialize_student
    from seqkd.teachers.cache import keep_teachers
    from seqkd.training import recovery, setup
    from seqkd.training.control import Control

    start = time.perf_counter()
    student = materialize_student(
        config.student, config.learner.precision, directory / "student_initial"
    )
    roles, control = placement.needed(config), Control(config.recovery, recorder.note)
    with (
        control.signals(),
        build.workers(
            config, student, checked, roles, control, recorder.progress.status
        ) as workers,
    ):
        recorder.note(f"actors ready after {time.perf_counter() - start:.0f} s")
        while True:
            try:
                warnings = check_workers(config, checked, workers, roles)
                break
            except LearnerLost as lost:
                recovery.replace_learner(workers, control, lost)
        for warning in warnings:
            recorder.note(f"warning: {warning}")
        if not config.two_step:
            keep_teachers(config, caches)
        context = setup.prepare(
            directory, config, checked, workers, roles, caches, recorder, control
        )
        return recovery.finish(context)
