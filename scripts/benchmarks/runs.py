"""Whole runs, each a process of its own: their steps, their memory, the way to their first step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from actors.placement import PROCESS
from scripts.benchmarks.rows import Row
from seqkd.config.run import Config
from seqkd.errors import ActorError
from seqkd.models.loading import expand
from seqkd.training.clock import STAGES

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
COMPILED = [
    "learner.compile=true",
    *(f"{role}.enforce_eager=false" for role in ("rollout", "teacher")),
]
"""The fastest way of a step that is strictly on-policy."""
ONE_CORE = [f"{role}.cpus=1" for role in ("rollout", "teacher", "learner")]


@dataclass
class Finished:
    """One run."""

    steps: list[dict[str, Any]]
    """Rows of its metrics."""
    first_step_s: float
    """From its start to the end of its first step."""
    peak: dict[str, float] = field(default_factory=dict)
    """GiB of resident memory at most, by process: "driver", "learner 0", …"""
    driver: list[tuple[int, float]] = field(default_factory=list)
    """Steps that were taken, and GiB of the driver, over time."""

    def later(self, *stages: str) -> list[float]:
        """Seconds in ``stages`` of every step but the first, which also compiles and allocates, and
        the last, beside which nothing is drawn."""
        return [sum(row[f"time_{stage}_s"] for stage in stages) for row in self.steps[1:-1]]


def run(
    config: str, overrides: Sequence[str], environment: Mapping[str, str] | None = None
) -> Finished:
    """Train, and watch every process's memory; ActorError with its last words where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "seqkd", "train", config),
            *(f"runs_dir={folder}", "name=run", *overrides),
        ]
        begun = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
            env={**os.environ, **(environment or {})},
        )  # fmt: skip
        finished = Finished([], 0.0)
        metrics = Path(folder) / "run" / "metrics.jsonl"
        with _followed(process.pid, metrics, finished, begun):
            said, _ = process.communicate()
        if process.returncode:
            raise ActorError(f"a run of the benchmark failed: {said.strip().splitlines()[-1]}")
        finished.steps = [json.loads(line) for line in metrics.read_text().splitlines()]
        return finished


@contextmanager
def _followed(pid: int, metrics: Path, finished: Finished, begun: float) -> Iterator[None]:
    """How far a run is, while the block runs, and its processes' memory."""

    def look(driver: psutil.Process) -> None:
        if not finished.first_step_s and metrics.exists() and metrics.stat().st_size:
            finished.first_step_s = time.perf_counter() - begun
        taken = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        finished.driver.append((taken, driver.memory_info().rss / GIB))

    with watched(pid, finished.peak, look):
        yield


@contextmanager
def watched(
    pid: int, peak: dict[str, float], look: Callable[[psutil.Process], None] = lambda process: None
) -> Iterator[None]:
    """While the block runs, twice a second: ``look``; and GiB of resident memory at most, by
    process, "driver" being ``pid`` and the others its children, into ``peak``."""
    over = threading.Event()

    def watch() -> None:
        driver = psutil.Process(pid)
        names: dict[int, str] = {pid: "driver"}
        while not over.wait(0.5):
            with suppress(psutil.Error):
                look(driver)
                for process in (driver, *driver.children(recursive=True)):
                    if not names.get(process.pid):  # Ray starts a worker before it names it
                        names[process.pid] = process.environ().get(PROCESS, "")
                    name = names[process.pid] or f"Ray's {process.pid}"
                    size = process.memory_info().rss / GIB
                    peak[name] = max(peak.get(name, 0.0), size)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def outside(file: str, repetitions: int) -> list[Row]:
    """What a step takes beside its stages; and the way to the first one's end."""
    rest = Row("end to end", "a step outside its stages", "s", "the whole step", 0.05)
    checks = Row("end to end", "the known text and other checks", "s", "the whole step")
    first = Row("start-up", "to the end of the first step", "s", "a later step")
    for _ in range(repetitions):
        finished = run(file, [])
        for row in finished.steps[1:-1]:
            stages = sum(row[f"time_{stage}_s"] for stage in STAGES)
            rest.add(row["time_step_s"] - stages, row["time_step_s"])
            checks.add(row["time_watch_s"], row["time_step_s"])
        first.add(finished.first_step_s, median(finished.later("step")))
    return [rest, checks, first]


def start_up(file: str, config: Config, repetitions: int) -> list[Row]:
    """Compiled as in :func:`turns.end_to_end`, where nothing was compiled before and nothing of the
    libraries and models is in memory, but what this process has itself mapped of them; and again
    with what the first left behind."""
    row = Row("start-up", "compiled, cold: to the end of the first step", "s", "the same, warm")
    models = [expand(config.student.model), *(expand(t.model) for t in config.teachers.values())]
    for _ in range(repetitions):
        with tempfile.TemporaryDirectory() as caches:
            left = {
                "TORCHINDUCTOR_CACHE_DIR": f"{caches}/torch",
                "VLLM_CACHE_ROOT": f"{caches}/vllm",
            }
            _evict(*sysconfig.get_paths().values(), *models)
            cold, warm = (run(file, [*COMPILED, "steps=1"], left) for _ in range(2))
        row.add(cold.first_step_s, warm.first_step_s)
    return [row]


def _evict(*folders: str) -> None:
    """Every file below them from the page cache."""
    for path in {path for folder in folders for path in Path(folder).rglob("*")}:
        if path.is_file() and os.access(path, os.R_OK):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def growth(file: str, config: Config, repetitions: int) -> Iterator[Row]:
    """What twice the work costs, and what a second process with a core of its own gains. The
    pruned student's completions go on to the limit, so that it says how long they are."""
    doubled = {
        "prompts": f"prompts_per_step={2 * config.prompts_per_step}",
        "samples per prompt": f"rollout.samples_per_prompt={2 * config.rollout.samples_per_prompt}",
        "completion length": f"rollout.max_tokens={2 * config.rollout.max_tokens}",
    }
    rows = {
        what: Row("growth", f"a step, twice the {what}", "s", "as it is", 2.1) for what in doubled
    }
    for _ in range(repetitions):
        once = run(file, [])
        for what, override in doubled.items():
            rows[what].pairs(run(file, [override]).later("step"), once.later("step"))
    yield from rows.values()
    ranks = Row("growth", "learning, two ranks of one core each", "s", "one")
    engines = Row("growth", "sampling, two engines of one core each", "s", "one")
    cores = ["learner.cpus=1", "rollout.cpus=1"]
    for _ in range(repetitions):
        one, two = run(file, cores), run(file, [*cores, "learner.ranks=2", "rollout.actors=2"])
        ranks.pairs(two.later("learn"), one.later("learn"))
        engines.pairs(two.later("sample"), one.later("sample"))
    yield from (ranks, engines)


def ahead(file: str, repetitions: int, cluster: str, environment: Mapping[str, str]) -> list[Row]:
    """A step that draws the next one meanwhile, each role on its own core, against the slower of
    drawing and learning where they take turns. ``cluster`` has a slot for each of three roles, of
    which no more than two are at work at once, here as in :func:`overlap`."""
    row = Row("overlap", "a step with rollout.max_staleness 1", "s", "the slower side alone", 1.15)
    split = [*ONE_CORE, "placement=split", f"cluster={cluster}"]
    for _ in range(repetitions):
        turns = run(file, split, environment)
        beside = run(file, [*split, "rollout.max_staleness=1"], environment)
        slower = map(max, turns.later("sample", "score"), turns.later("learn"))
        row.pairs(beside.later("step"), slower)
    return [row]


def overlap(file: str, repetitions: int, cluster: str, environment: Mapping[str, str]) -> list[Row]:
    """Scoring beside sampling, each on its own core."""
    draw = Row("overlap", "a draw of 8 waves with placement split", "s", "sampling, then scoring")
    floor = Row("overlap", "the same", "s", "the slower of the two alone")
    # Two sequences at a time, and as many scored at once.
    waves = [*ONE_CORE, "rollout.max_num_seqs=2", "teacher.batch_tokens=320"]
    split = [*waves, "placement=split", f"cluster={cluster}"]
    for _ in range(repetitions):
        alone, beside = run(file, waves), run(file, split, environment)
        took = beside.later("sample", "score")
        draw.pairs(took, alone.later("sample", "score"))
        floor.pairs(took, map(max, alone.later("sample"), alone.later("score")))
    return [draw, floor]


def driver(steps: int) -> list[Row]:
    """The driver's memory after many small steps, against that after a tenth of them."""
    finished = run("configs/tiny.yaml", [f"steps={steps}", "evaluation.prompts=0"])
    row = Row("driver", f"memory after {steps} tiny steps", "GiB", "after a tenth of them", 1.05)

    def within(low: float, high: float) -> float:
        return median(gib for taken, gib in finished.driver if low * steps < taken <= high * steps)

    row.add(within(0.9, 1.0), within(0.1, 0.2))
    return [row]
