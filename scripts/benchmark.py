"""Measure speed and memory on this machine: python -m scripts.benchmark [SECTION ...]

Everything is measured by turns with what it is compared with, so that a slower or busier machine
moves both; what is to be read are the ratios. Nothing else may run beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from actors.local_cluster import ENVIRONMENT, local_head
from scripts.benchmarks.rows import Row, table
from seqkd.config import run as configuration
from seqkd.config.base import Precision
from seqkd.console import quiet, run_command
from seqkd.errors import ConfigError
from seqkd.files import disk_errors

CONFIG = "configs/benchmark.yaml"
SECTIONS = (
    "stages",
    "objectives",
    "steps",
    "start-up",
    "trl",
    "trl-bf16",
    "growth",
    "ahead",
    "overlap",
    "driver",
)
ON_GPU = "gpu"
"""A section for itself: the losses and the learner on a GPU, without Ray and vLLM."""


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 2 a message says what to mend."""
    parser = argparse.ArgumentParser(
        description="Measure speed and memory on this machine, beside what they are compared with.",
        epilog="The models are the quickstart's: scripts/prepare_quickstart.py writes them. trl "
        "and trl-bf16 need the extra: pip install -e .[benchmark]",
    )
    parser.add_argument(
        "sections",
        nargs="*",
        metavar="SECTION",
        help=f"of {', '.join(SECTIONS)} (all if "
        f"none is named); or {ON_GPU}, on a machine that has one",
    )
    parser.add_argument("--repeat", type=int, default=5, help="repetitions (default 5)")
    parser.add_argument("--config", default=CONFIG, help=f"default {CONFIG}")
    parser.add_argument("--out", default="benchmark.json", help="default benchmark.json")
    args = parser.parse_args(argv)
    if unknown := set(args.sections) - {*SECTIONS, ON_GPU}:
        parser.error(
            f"no section {sorted(unknown)[0]!r}. There are {', '.join(SECTIONS)}, {ON_GPU}."
        )
    return run_command(lambda: measure(args.sections or SECTIONS, args))


def measure(sections: tuple[str, ...] | list[str], args: argparse.Namespace) -> int:
    """Each section in turn; what there is so far is in the file."""
    quiet()
    from scripts.benchmarks import objectives, runs, stages, traffic, turns
    from seqkd.storage import environment

    file, repeat = args.config, args.repeat
    config = configuration.load(file)

    def split(measured: Callable[..., list[Row]]) -> list[Row]:
        with three_slots() as cluster:
            return measured(file, repeat, cluster, ENVIRONMENT)

    def trl(precision: Precision) -> Iterator[Row]:
        return turns.end_to_end(file, config, repeat, precision, three_slots, ENVIRONMENT)

    work: dict[str, Callable[[], Iterable[Row]]] = {
        "stages": lambda: stages.measure(config, repeat),
        "objectives": lambda: objectives.measure(repeat),
        "steps": lambda: runs.outside(file, repeat),
        "start-up": lambda: runs.start_up(file, config, repeat),
        "trl": lambda: trl("float32"),
        "trl-bf16": lambda: trl("bfloat16"),
        "growth": lambda: runs.growth(file, config, repeat),
        "ahead": lambda: split(runs.ahead),
        "overlap": lambda: split(runs.overlap),
        "driver": lambda: [*runs.driver(1000), traffic.measure(repeat)],
        ON_GPU: lambda: on_gpu(repeat),
    }
    rows: list[Row] = []
    for section in sections:
        print(f"measuring: {section}", flush=True)
        for row in work[section]():
            rows.append(row)
            found = {"environment": environment.describe(), "rows": [row.plain() for row in rows]}
            with disk_errors(Path(args.out)):
                Path(args.out).write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(table(rows))
    print(f"\n{args.out}")
    return 0


@contextmanager
def three_slots() -> Iterator[str]:
    """A cluster in which each of three roles has a place, whatever the machine has."""
    with local_head(ENVIRONMENT, "--num-cpus=3") as head:
        yield head.cluster


def on_gpu(repeat: int) -> Iterator[Row]:
    """Losses, then a learner's steps; ConfigError where there is no GPU."""
    import torch

    if not torch.cuda.is_available():
        raise ConfigError(f"section {ON_GPU!r}: torch finds no GPU on this machine. Leave it out.")
    from scripts.benchmarks import gpu, objectives

    yield from objectives.measure(repeat, "cuda")
    yield from (*gpu.measure(repeat), *gpu.teacher(repeat), *gpu.publishing(repeat))


if __name__ == "__main__":
    sys.exit(main())
