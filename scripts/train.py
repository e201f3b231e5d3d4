"""Run a distillation: python scripts/train.py CONFIG [key=value ...]"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import closing
from typing import TYPE_CHECKING

from seqkd.config import run as configuration
from seqkd.config.run import Config
from seqkd.console import print_message, run_command
from seqkd.errors import LearnerLost, SeqkdError, StorageError
from seqkd.storage import run_directory
from seqkd.training import trackers

if TYPE_CHECKING:
    from pathlib import Path

    from seqkd.checks.preflight import Checked
    from seqkd.evaluation.heldout import Measurement
    from seqkd.teachers.cache import TeacherCache
    from seqkd.training.recorder import Recorder


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 2 a message says what to mend or which actor failed, 1 a traceback."""
    parser = argparse.ArgumentParser(
        description="Distil a teacher into a student, as a configuration says.",
        epilog="Example: python scripts/train.py configs/tiny.yaml sampler=teacher steps=5",
    )
    parser.add_argument("config", help="YAML file (see configs/)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. learner.lr=1e-5")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved configuration, the plan and every finding; start nothing",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint of this run; begin it where there is none",
    )
    parser.add_argument("--verbose", action="store_true", help="show the libraries' own logs")
    args = parser.parse_intermixed_args(argv)

    def run() -> int:
        config = configuration.load(args.config, args.overrides)
        if args.dry_run:
            return dry_run(config, args.resume)
        return train(config, args.verbose, args.resume)

    return run_command(run, "go on with --resume")


def check(config: Config) -> tuple[Config, dict[str, TeacherCache], Checked]:
    """The configuration, with the recorded teachers where none is loaded; the journals, if any;
    and what the checks found."""
    from seqkd.checks import preflight
    from seqkd.teachers.cache import open_caches
    from seqkd.training.precompute import check_recorded

    config, journals = open_caches(config, teacher_here=not config.two_step)
    checked = preflight.check(config, teacher_here=not config.two_step)
    if config.two_step:
        check_recorded(config, journals, checked)
    return config, journals, checked


def dry_run(config: Config, resume: bool) -> int:
    """Print everything that can be known without starting anything; 2 where something is wrong."""
    import os

    from actors.placement import plan

    quiet()
    directory, problems, warnings = run_directory.locate(config), [], []
    print(configuration.dump(config))
    the_plan = plan(config)
    print("plan:")
    for actor in the_plan.actors:
        gpus = f", {actor.gpus:g} GPUs" if actor.gpus else ""
        name = f"{actor.role} {actor.teacher}".strip()
        print(f"  {name} {actor.index}: {actor.threads} threads{gpus}, bundle {actor.bundle}")
    print(f"  bundles ({config.placement}): {[dict(b) for b in the_plan.bundles]}")
    print(f"  run directory: {directory}")

    def checked() -> None:
        nonlocal config
        config, _, found = check(config)
        warnings.extend(found.warnings)
        print(f"  {len(found.train)} training prompts, {len(found.heldout)} held-out prompts")
        print("".join(f"    {line}\n" for line in found.sources), end="")
        warnings.extend(memory(config, found, show=True))

    def packages() -> None:
        trackers.check(config.trackers)

    def resources() -> None:
        if on_this_machine(config):
            the_plan.check(os.cpu_count() or 1, visible_gpus(), "this machine")

    def place() -> None:
        changes = run_directory.resumption(directory, config, resume).changes
        print("".join(f"  changed: {line}\n" for line in changes), end="")

    for step in (place, packages, checked, resources):
        try:
            step()
        except SeqkdError as error:
            problems.append(str(error))
    print("findings:" if problems or warnings else "findings: none")
    for level, texts in (("error", problems), ("warning", warnings)):
        for text in texts:
            print_message(level, text, indent="  ")
    return 2 if problems else 0


def on_this_machine(config: Config) -> bool:
    """Whether the run starts a cluster of its own here."""
    import os

    return config.cluster is None and "RAY_ADDRESS" not in os.environ


def memory(config: Config, checked: Checked, show: bool = False) -> list[str]:
    """Estimate the plan's memory and compare it with this machine's; returns warnings."""
    from actors.placement import needed
    from seqkd.checks.memory import check_memory, estimate, gpu_memory, host_memory

    needs = estimate(config, checked.student, checked.teachers, needed(config))
    if show:
        print("  memory by estimate, GiB (processes x each):")
        for need in needs:
            print(f"    {need}")
    if not on_this_machine(config):
        return []
    warning = check_memory(needs, host_memory(), gpu_memory())
    return [warning] if warning else []


def visible_gpus() -> int:
    """GPUs of this machine."""
    import torch

    return torch.cuda.device_count()


def quiet() -> None:
    """Keep the libraries' progress bars and notices out of the way."""
    import logging
    import os
    import warnings

    from transformers.utils import logging as transformers_logging

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # of this process; each actor gets its own
    warnings.filterwarnings("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def train(config: Config, verbose: bool, resume: bool) -> int:
    """The whole run, from the checks to the exported student."""
    directory = run_directory.locate(config)
    resumption = run_directory.resumption(directory, config, resume)
    if not verbose:
        quiet()

    start = time.perf_counter()
    asked = config
    trackers.check(config.trackers)
    config, journals, checked = check(config)
    for warning in (*checked.warnings, *memory(config, checked)):
        print_message("warning", warning)
    data = {"training": checked.train, "held-out": checked.heldout, "corpus": checked.corpus}
    if resumption.found:
        run_directory.refuse_other_data(directory, data)
        for line in resumption.changes:
            print(f"changed: {line}")
    elif resume:
        print(f"--resume: {directory} holds no run yet; it begins now")

    from actors import build
    from seqkd import report
    from seqkd.evaluation import summary
    from seqkd.report import model_card
    from seqkd.storage import run_reader
    from seqkd.training import replay_log
    from seqkd.training.recorder import Recorder

    with build.connect(config, verbose):
        build.check_resources(config)
        with run_directory.lock(directory), closing(Recorder(directory, config)) as recorder:
            replay_log.discard(directory / "journal", resumption)
            run_directory.initialize(directory, asked, data)
            print(f"run directory: {directory}\nstarting the actors", flush=True)
            measured = learn(directory, config, checked, journals, recorder)
    evaluation = run_reader.read_evaluation(directory) if measured else None
    if evaluation:
        print("\n" + summary.render(evaluation))
    model_card.write(directory, asked, evaluation)
    try:
        report.write([directory], directory / "report.html")
    except StorageError as error:  # the run itself is whole
        print_message("warning", str(error))
    print("\n" + summary.closing(directory, recorder.stage_seconds, time.perf_counter() - start))
    return 0


def learn(
    directory: Path,
    config: Config,
    checked: Checked,
    journals: dict[str, TeacherCache],
    recorder: Recorder,
) -> dict[str, Measurement]:
    """With every actor: check them, train, and measure."""
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
        build.workers(config, student, checked, roles, control) as workers,
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
            keep_teachers(config, journals)
        run = setup.prepare(directory, config, checked, workers, roles, journals, recorder, control)
        return recovery.finish(run)


if __name__ == "__main__":
    sys.exit(main())
