"""Score first, train later: python scripts/precompute.py CONFIG [key=value ...]"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from typing import Any

from train import quiet

from seqkd.config import run as configuration
from seqkd.config.phases import PhaseConfig
from seqkd.config.run import Config
from seqkd.config.samplers import RECORDED, SAMPLERS
from seqkd.console import print_message, run_command
from seqkd.errors import ConfigError


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 2 a message says what to mend or which actor failed, 1 a traceback."""
    parser = argparse.ArgumentParser(
        description="Let the teacher write and score what sampler=teacher_cache reads, for "
        "scripts/train.py to learn from without it. Once more: what is there is kept.",
        epilog="Example: python scripts/precompute.py two_step.yaml && "
        "python scripts/train.py two_step.yaml",
    )
    parser.add_argument(
        "config", help="YAML file with teacher_cache.path and sampler: teacher_cache"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. steps=100")
    parser.add_argument("--verbose", action="store_true", help="show the libraries' own logs")
    args = parser.parse_intermixed_args(argv)
    return run_command(
        lambda: precompute(configuration.load(args.config, args.overrides), args.verbose),
        "the same command goes on",
    )


def precompute(config: Config, verbose: bool) -> int:
    """The checks, the teacher's actors, and every draw of the run."""
    if RECORDED not in config.samplers:
        raise ConfigError(
            "sampler: no term has sampler 'teacher_cache'. Add sampler=teacher_cache."
        )
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
        print(f"teacher_cache: {cache.directory}", flush=True)
    roles = placement.recording(config)
    print(size(config, "teacher" in roles), flush=True)
    start = time.perf_counter()
    steps = sum(p.steps for _, p in config.phases if RECORDED in p.by_sampler)

    control = Control(config.recovery, lambda text: print(text, flush=True))

    def report(done: int, tokens: int) -> None:
        control.saved()
        seconds = time.perf_counter() - start
        left = seconds / done * (steps - done)
        print(
            f"{done:>5}/{steps} steps  {tokens} tokens  {tokens / seconds:.0f} tokens/s  "
            f"ETA {int(left // 60)}:{int(left % 60):02d}",
            flush=True,
        )

    with build.connect(config, verbose):
        build.check_resources(config, roles)
        with build.workers(config, config.student.model, checked, roles, control) as workers:
            alone: Any = TeacherAlone(config)
            workers = replace(workers, learner=alone)
            for warning in check_workers(config, checked, workers, roles):
                print_message("warning", warning)
            keep_teachers(config, caches)
            workers = with_caches(workers, config, checked.stop_ids, checked.vocabulary, caches)
            print(f"actors ready after {time.perf_counter() - start:.0f} s", flush=True)
            start = time.perf_counter()
            record(config, workers, checked, report)
    alone = ", with no teacher" if config.two_step else ""
    print(f"done: scripts/train.py with the same configuration learns from it{alone}")
    return 0


def size(config: Config, scored: bool) -> str:
    """What the teacher cache will take at most, before it is written."""
    from seqkd.teachers.cache import bytes_per_token

    tokens = config.rollout.max_tokens * sum(
        phase.steps * phase.prompts_per_step * samples(config, phase)
        for _, phase in config.phases
        if RECORDED in phase.by_sampler
    )
    each = 4  # the token itself
    if scored:
        each = max(map(bytes_per_token, config.teachers.values()))
    return (
        f"{each:,} bytes a token, at most {tokens:,} tokens ({tokens * each / 2**30:.3g} GiB): "
        + (f"scores of kind {config.teacher.scores}" if scored else "completions without scores")
    )


def samples(config: Config, phase: PhaseConfig) -> int:
    """Completions of one prompt."""
    return 1 if SAMPLERS[config.source(RECORDED)].from_data else config.samples_per_prompt(phase)


if __name__ == "__main__":
    sys.exit(main())
