"""Benchmarks of complete training runs in separate processes: steps, memory and start-up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any, NoReturn, Self

import psutil

from actors.local_cluster import ENVIRONMENT, local_head
from actors.placement import PROCESS
from scripts.benchmarks.rows import Row
from seqkd.config import run as configuration
from seqkd.errors import ActorError
from seqkd.models.loading import expand
from seqkd.training.clock import STAGES

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
COMPILED = ("learner.compile=true", "rollout.enforce_eager=false", "teacher.enforce_eager=false")
"""Fastest configuration of a step that is strictly on-policy."""
ONE_CORE = ("rollout.cpus=1", "teacher.cpus=1", "learner.cpus=1")
SPLIT = (*ONE_CORE, "placement=split")


class Training:
    """Training process that ends with the block. ``steps`` is a file to which it appends one line
    per step."""

    def __init__(
        self, command: Iterable[str], steps: Path, environment: Mapping[str, str], folder: Path
    ) -> None:
        self.steps, self.begun = steps, time.perf_counter()
        self.sampled = self.begun
        self.peak: dict[int, float] = {}
        """Peak resident memory of each process in GiB, by process id."""
        self.names: dict[int, str] = {}
        self.log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  closed by stop
        self.process = psutil.Popen(
            [sys.executable, *command], cwd=folder, env={**os.environ, **environment},
            stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log,
        )  # fmt: skip
        self.roots: list[psutil.Process] = [self.process]
        """Processes that are paused together with their descendants."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Terminate the process, unless it has ended."""
        self.resume()
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait()
        self.log.close()

    def next_step(self) -> float:
        """Wait for the end of the next step. Returns the seconds since the start of the process.
        Raises ActorError with its last message if the process ended."""
        before = self.completed()
        while self.completed() == before:
            if self.process.poll() is not None:
                self._fail()
            self._watch()
        return time.perf_counter() - self.begun

    def finish(self) -> None:
        """Wait for the end of the process. Raises ActorError with its last message if it failed."""
        while self.process.poll() is None:
            self._watch()
        if self.process.returncode:
            self._fail()

    def completed(self) -> int:
        """Return the number of completed steps."""
        return self.steps.read_bytes().count(b"\n") if self.steps.exists() else 0

    def memory(self, name: str) -> float:
        """Return the peak resident memory of an actor in GiB, for example of "learner 0"."""
        return max(gib for pid, gib in self.peak.items() if self.names[pid] == name)

    def turn(self) -> float:
        """Resume until the end of the next step, and pause again. Returns the seconds."""
        begun = time.perf_counter()
        self.resume()
        self.next_step()
        self.pause()
        return time.perf_counter() - begun

    def pause(self) -> None:
        """Suspend all processes."""
        self._each(psutil.Process.suspend)

    def resume(self) -> None:
        """Resume all processes."""
        self._each(psutil.Process.resume)

    def _each(self, action: Callable[[psutil.Process], None]) -> None:
        for root in self.roots:
            with suppress(psutil.NoSuchProcess):
                for process in (root, *root.children(recursive=True)):
                    with suppress(psutil.NoSuchProcess):
                        action(process)

    def _watch(self) -> None:
        """Wait a few milliseconds, and measure memory twice per second."""
        time.sleep(0.005)
        if time.perf_counter() - self.sampled > 0.5:
            self._each(self._measure)
            self.sampled = time.perf_counter()

    def _measure(self, process: psutil.Process) -> None:
        gib = process.memory_info().rss / GIB
        self.peak[process.pid] = max(self.peak.get(process.pid, 0.0), gib)
        # Read every time, because Ray starts a worker before it assigns an actor to it.
        with suppress(psutil.AccessDenied):
            self.names[process.pid] = process.environ().get(PROCESS, "")

    def _fail(self) -> NoReturn:
        self.log.seek(0)
        lines = self.log.read().strip().splitlines() or ["no message"]
        raise ActorError(f"a run of the benchmark failed: {lines[-1]}")


@contextmanager
def trained(
    file: str, overrides: Iterable[str], environment: Mapping[str, str] | None = None
) -> Iterator[Training]:
    """Start a training run of ``file``."""
    with tempfile.TemporaryDirectory() as folder:
        place = (f"runs_dir={folder}", "name=run")
        command = ("-m", "seqkd", "train", file, *place, *overrides)
        steps = Path(folder) / "run" / "metrics.jsonl"
        with Training(command, steps, environment or {}, ROOT) as training:
            yield training


class Run:
    """A finished training run."""

    def __init__(
        self, file: str, overrides: Iterable[str] = (), environment: Mapping[str, str] | None = None
    ) -> None:
        with trained(file, overrides, environment) as training:
            self.first_step_s = training.next_step()
            """Seconds from the start of the process to the end of the first step."""
            training.finish()
            lines = training.steps.read_text().splitlines()
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines][1:-1]
        """Metrics of each step except the first, which also compiles and allocates, and the last,
        during which nothing is prefetched."""

    def seconds(self, *stages: str) -> list[float]:
        """Return the seconds that each step spent in ``stages``."""
        return [sum(row[f"time_{stage}_s"] for stage in stages) for row in self.rows]


@contextmanager
def three_slots() -> Iterator[str]:
    """Start a Ray cluster with three cores for three roles, regardless of the machine's cores."""
    with local_head(ENVIRONMENT, "--num-cpus=3") as head:
        yield head.cluster


def step_overhead(file: str, repetitions: int) -> list[Row]:
    """Measure the time of a step outside its stages, and the time to the first step."""
    rest = Row("end to end", "a step outside its stages", "s", "the whole step", 0.05)
    checks = Row("end to end", "the probe text and other checks", "s", "the whole step")
    first = Row("start-up", "to the end of the first step", "s", "a later step")
    for _ in range(repetitions):
        run = Run(file)
        steps = run.seconds("step")
        rest.extend((s - t for s, t in zip(steps, run.seconds(*STAGES), strict=True)), steps)
        checks.extend(run.seconds("watch"), steps)
        first.add(run.first_step_s, median(steps))
    return [rest, checks, first]


def start_up(file: str, repetitions: int) -> list[Row]:
    """Measure compiled runs with cold caches, then again with warm caches. Cold means empty compile
    caches, and libraries and models not in the page cache, except for files mapped by this
    process."""
    config = configuration.load(file)
    row = Row("start-up", "compiled, cold: to the end of the first step", "s", "the same, warm")
    models = [expand(config.student.model), *(expand(t.model) for t in config.teachers.values())]
    for _ in range(repetitions):
        with tempfile.TemporaryDirectory() as caches:
            environment = {
                "TORCHINDUCTOR_CACHE_DIR": f"{caches}/torch",
                "VLLM_CACHE_ROOT": f"{caches}/vllm",
            }
            _evict(*sysconfig.get_paths().values(), *models)
            cold, warm = (Run(file, [*COMPILED, "steps=1"], environment) for _ in range(2))
        row.add(cold.first_step_s, warm.first_step_s)
    return [row]


def _evict(*folders: str) -> None:
    """Remove all files below ``folders`` from the page cache."""
    for path in {path for folder in folders for path in Path(folder).rglob("*")}:
        if path.is_file() and os.access(path, os.R_OK):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def growth(file: str, repetitions: int) -> list[Row]:
    """Measure the cost of twice the work, and the gain from a second process with its own core. The
    completions of the pruned student always reach the token limit, which therefore sets their
    length."""
    config = configuration.load(file)
    doubled = {
        "prompts": f"prompts_per_step={2 * config.prompts_per_step}",
        "samples per prompt": f"rollout.samples_per_prompt={2 * config.rollout.samples_per_prompt}",
        "completion length": f"rollout.max_tokens={2 * config.rollout.max_tokens}",
    }
    rows = {name: Row("growth", f"a step, twice the {name}", "s", "as it is", 2.1)
            for name in doubled}  # fmt: skip
    ranks = Row("growth", "learning, two ranks of one core each", "s", "one")
    engines = Row("growth", "sampling, two engines of one core each", "s", "one")
    cores = ["learner.cpus=1", "rollout.cpus=1"]
    for _ in range(repetitions):
        base = Run(file)
        for name, override in doubled.items():
            rows[name].extend(Run(file, [override]).seconds("step"), base.seconds("step"))
        one, two = Run(file, cores), Run(file, [*cores, "learner.ranks=2", "rollout.actors=2"])
        ranks.extend(two.seconds("learn"), one.seconds("learn"))
        engines.extend(two.seconds("sample"), one.seconds("sample"))
    return [*rows.values(), ranks, engines]


def ahead(file: str, repetitions: int) -> list[Row]:
    """Compare a step that prefetches the next rollouts, with one core per role, with the slower of
    its two sides (sampling and scoring, learning) in a run that alternates them. At most two roles
    run at the same time."""
    row = Row(
        "overlap", "a step with rollout.max_off_policy_steps 1", "s", "the slower side alone", 1.15
    )
    for _ in range(repetitions):
        with three_slots() as cluster:
            split = [*SPLIT, f"cluster={cluster}"]
            alternating = Run(file, split, ENVIRONMENT)
            prefetched = Run(file, [*split, "rollout.max_off_policy_steps=1"], ENVIRONMENT)
        slower = map(max, alternating.seconds("sample", "score"), alternating.seconds("learn"))
        row.extend(prefetched.seconds("step"), slower)
    return [row]


def overlap(file: str, repetitions: int) -> list[Row]:
    """Compare scoring in parallel with sampling, one core each, with scoring after sampling."""
    rollouts = Row("overlap", "rollouts in 8 waves, placement split", "s", "sampling, then scoring")
    floor = Row("overlap", "the same", "s", "the slower of the two alone")
    # Two sequences are sampled at a time, and two are scored at a time.
    waves = ["rollout.max_num_seqs=2", "teacher.batch_tokens=320"]
    for _ in range(repetitions):
        alone = Run(file, [*ONE_CORE, *waves])
        with three_slots() as cluster:
            split = Run(file, [*SPLIT, *waves, f"cluster={cluster}"], ENVIRONMENT)
        seconds = split.seconds("sample", "score")
        rollouts.extend(seconds, alone.seconds("sample", "score"))
        floor.extend(seconds, map(max, alone.seconds("sample"), alone.seconds("score")))
    return [rollouts, floor]


def driver_memory(steps: int) -> Row:
    """Compare the driver's memory after many small steps with its memory after a tenth of them."""
    row = Row("driver", f"memory after {steps} tiny steps", "GiB", "after a tenth of them", 1.05)
    sizes = []
    with trained("configs/tiny.yaml", [f"steps={steps}", "evaluation.prompts=0"]) as training:
        for _ in range(steps):
            training.next_step()
            sizes.append(training.process.memory_info().rss / GIB)
        training.finish()
    tenth = steps // 10
    row.add(median(sizes[-tenth:]), median(sizes[tenth : 2 * tenth]))
    return row
