"""Record the teacher's samples and scores for a later seqkd train without a teacher."""

from __future__ import annotations

import argparse
import time
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from seqkd.cli.arguments import add_config, add_verbose
from seqkd.console import Progress, print_message, quiet, run_command, show
from seqkd.errors import ConfigError

if TYPE_CHECKING:
    from seqkd.config.phases import PhaseConfig
    from seqkd.config.run import Config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``seqkd precompute``."""
    parser.epilog = "Example: seqkd precompute two_step.yaml && seqkd train two_step.yaml"
    add_config(parser, "YAML file with teacher_cache.path and sampler: teacher_cache", "steps=100")
    add_verbose(parser)


def run(args: argparse.Namespace) -> int:
    """Run ``seqkd precompute``."""

    def action() -> int:
        from seqkd.config.run import load

        return precompute(load(args.config, args.overrides), args.verbose)

    return run_command(action, "run the same command again to continue")


def precompute(config: Config, verbose: bool) -> int:
    """Check, start the teacher's actors, and record everything that the run will read from them.
    Samples and scores that are already recorded are kept."""
    from seqkd.config.samplers import RECORDED

    if RECORDED not in config.samplers:
        raise ConfigError("sampler: no term uses 'teacher_cache'. Set sampler=teacher_cache.")
    if not verbose:
        quiet()
    from actors import build, placement
    from seqkd.checks import preflight
    from seqkd.checks.startup import check_workers
    from seqkd.teachers.cache import keep_teachers, open_caches, with_caches
    from seqkd.training.control import Control
    from seqkd.training.precompute import TeacherAlone, record

    checked = preflight.check(config)
    for warning in checked.warnings:
        print_message("warning", warning)
    _, caches = open_caches(config, teacher_here=True)
    for cache in caches.values():
        show(f"teacher_cache: {cache.directory}")
    roles = placement.recording(config)
    show(size_limit(config, "teacher" in roles))
    start = time.perf_counter()
    steps = sum(p.steps for _, p in config.phases if RECORDED in p.by_sampler)
    control = Control(config.recovery, show)

    def report(done: int, tokens: int) -> None:
        control.saved()
        seconds = time.perf_counter() - start
        figures = f"{tokens} tokens  {tokens / seconds:.0f} tokens/s"
        progress.step("recording", done, steps, figures, seconds / done)

    with closing(Progress()) as progress, build.connect(config, verbose):
        build.check_resources(config, roles)
        progress.wait("starting the actors")
        with build.workers(
            config, config.student.model, checked, roles, control, progress.status
        ) as workers:
            learner: Any = TeacherAlone(config)
            workers = replace(workers, learner=learner)
            for warning in check_workers(config, checked, workers, roles):
                print_message("warning", warning)
            keep_teachers(config, caches)
            workers = with_caches(workers, config, checked.stop_ids, checked.vocabulary, caches)
            progress.note(f"actors ready after {time.perf_counter() - start:.0f} s")
            start = time.perf_counter()
            record(config, workers, checked, report)
    show(
        "done: seqkd train with the same configuration reads the recording"
        + (" and starts no teacher" if config.two_step else "")
    )
    return 0


def size_limit(config: Config, scored: bool) -> str:
    """Describe the maximum size of the recording."""
    from seqkd.config.samplers import RECORDED
    from seqkd.teachers.cache import bytes_per_token

    tokens = config.rollout.max_tokens * sum(
        phase.steps * phase.prompts_per_step * samples_per_prompt(config, phase)
        for _, phase in config.phases
        if RECORDED in phase.by_sampler
    )
    size = 4  # the token itself
    if scored:
        size = max(map(bytes_per_token, config.teachers.values()))
    return (
        f"{size:,} bytes per token, at most {tokens:,} tokens ({tokens * size / 2**30:.3g} GiB): "
        + (f"scores of kind {config.teacher.scores}" if scored else "completions without scores")
    )


def samples_per_prompt(config: Config, phase: PhaseConfig) -> int:
    """Return the number of completions that are recorded per prompt."""
    from seqkd.config.samplers import RECORDED, SAMPLERS

    return 1 if SAMPLERS[config.source(RECORDED)].from_data else config.samples_per_prompt(phase)
