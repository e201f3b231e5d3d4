"""Measure speed and memory on this machine: python -m scripts.benchmark [SECTION ...]

Each measurement alternates with its reference, so that the load of the machine affects both.
Compare the ratios. Run nothing else at the same time.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path

from scripts.benchmarks.rows import Row, table
from seqkd.cli.arguments import Parser
from seqkd.console import quiet, run_command
from seqkd.files import disk_errors

CONFIG = "configs/benchmark.yaml"
SECTIONS = {
    "stages": "stages.measure",
    "objectives": "objectives.measure",
    "steps": "runs.step_overhead",
    "start-up": "runs.start_up",
    "trl": "trl.compare",
    "trl-bf16": "trl.compare_bfloat16",
    "growth": "runs.growth",
    "ahead": "runs.ahead",
    "overlap": "runs.overlap",
    "driver": "driver.measure",
    "gpu": "gpu.measure",
}
"""Functions in scripts/benchmarks that map (configuration file, repetitions) to rows."""
ON_CORES = [section for section in SECTIONS if section != "gpu"]


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0 for success, 2 for an error that the user can fix."""
    parser = Parser(
        description="Measure speed and memory on this machine, each next to a reference.",
        epilog="The benchmarks use the models of the quickstart, which "
        "scripts/prepare_quickstart.py writes. trl and trl-bf16 require the extra: "
        "pip install -e .[benchmark]",
    )
    parser.add_argument(
        "sections",
        nargs="*",
        metavar="SECTION",
        help=f"any of {', '.join(ON_CORES)} (default: all of these), or gpu on a machine with one",
    )
    parser.add_argument("--repeat", type=int, default=5, help="repetitions (default 5)")
    parser.add_argument("--config", default=CONFIG, help=f"default {CONFIG}")
    parser.add_argument("--out", default="benchmark.json", help="default benchmark.json")
    args = parser.parse_args(argv)
    if unknown := set(args.sections) - set(SECTIONS):
        parser.error(f"no section {min(unknown)!r}. Sections: {', '.join(SECTIONS)}.")
    sections = args.sections or ON_CORES
    return run_command(lambda: measure(sections, args.config, args.repeat, Path(args.out)))


def measure(sections: Iterable[str], config: str, repetitions: int, out: Path) -> int:
    """Measure all sections. After each row, all rows so far are written to ``out``."""
    quiet()
    from seqkd.storage import environment

    rows: list[Row] = []
    for section in sections:
        print(f"measuring: {section}", flush=True)
        module, _, function = SECTIONS[section].partition(".")
        rows_of: Callable[[str, int], Iterable[Row]] = getattr(
            import_module(f"scripts.benchmarks.{module}"), function
        )
        for row in rows_of(config, repetitions):
            rows.append(row)
            results = {"environment": environment.describe(), "rows": [r.to_json() for r in rows]}
            with disk_errors(out):
                out.write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(table(rows))
    print(f"\n{out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
