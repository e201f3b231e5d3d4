"""Whole steps of ours and of TRL's by turns, on the same models, prompts, lengths and divergence.
Both are processes that live through the measurement; while one takes a step, the other waits: what
the machine does from one minute to the next is the same for both. TRL waits for a line of its
input; of ours every process is stopped, as an idle Ray takes a tenth of a core."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from scripts.benchmarks.rows import Row
from scripts.benchmarks.runs import COMPILED, ONE_CORE, ROOT, watched
from seqkd.checks import preflight
from seqkd.config.base import Precision
from seqkd.config.run import Config
from seqkd.config.teacher import HfTeacherConfig, VllmTeacherConfig
from seqkd.data.stream import PromptStream
from seqkd.errors import ActorError
from seqkd.models.export import materialize_student
from seqkd.models.loading import expand

READY = "waiting for its turn"


def wait_for_turn() -> None:
    """In such a process: say that the step before is done, and wait for the word to take one. Ends
    the process where there is no one to say it any more."""
    print(READY, flush=True)
    if not sys.stdin.readline():
        sys.exit()


class Contender:
    """A process that takes a step when it is told to."""

    def __init__(self, process: subprocess.Popen[str], errors: Path) -> None:
        self.process, self.errors = process, errors
        self._wait()

    def step(self) -> float:
        """Seconds of one."""
        assert self.process.stdin is not None
        begun = time.perf_counter()
        with suppress(BrokenPipeError):  # what has ended says why
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        self._wait()
        return time.perf_counter() - begun

    def _wait(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.strip() == READY:
                return
        said = self.errors.read_text(errors="replace").strip() or "no message"
        raise ActorError(
            f"a process of the benchmark ended: {said.splitlines()[-1]} (TRL is in the extra: "
            "pip install -e .[benchmark])"
        )


@contextmanager
def contender(
    module: str, arguments: Sequence[str], environment: Mapping[str, str], peak: dict[str, float]
) -> Iterator[Contender]:
    """``python -m module arguments``, once it is ready; ``peak``: see :func:`runs.watched`."""
    with tempfile.TemporaryDirectory() as folder:
        errors = Path(folder) / "stderr"
        with errors.open("w") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True,
                env={**os.environ, **environment}, cwd=ROOT,
            )  # fmt: skip
        try:
            with watched(process.pid, peak):
                yield Contender(process, errors)
        except BaseException:
            process.terminate()
            raise
        finally:
            process.communicate()


@contextmanager
def all_else_stopped(spared: Contender) -> Iterator[None]:
    """While the block runs, every process that this one has started, but ``spared``'s."""
    mine, left = psutil.Process(), psutil.Process(spared.process.pid)
    every = {*mine.children(recursive=True)} - {left, *left.children(recursive=True)}
    try:
        _each(every, psutil.Process.suspend)
        yield
    finally:
        _each(every, psutil.Process.resume)


def _each(processes: Iterable[psutil.Process], do: Callable[[psutil.Process], None]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # it has ended since
            do(process)


def end_to_end(
    file: str, config: Config, repetitions: int, precision: Precision,
    slots: Callable[[], AbstractContextManager[str]], environment: Mapping[str, str],
) -> Iterator[Row]:  # fmt: skip
    """A step as the configuration has it; in the fastest way of a step that is strictly on-policy;
    and drawing the next one meanwhile, on a cluster as in :func:`runs.ahead`. TRL as it comes; and
    at last, in float32, with :func:`actors.cpu_matmul.use_onednn`, which TRL does not offer."""
    against = "TRL's DistillationTrainer"
    ours = [file, *(f"{role}.precision={precision}" for role in ("learner", "rollout", "teacher"))]
    fast = [*ours, *COMPILED]
    beside = [*fast, *ONE_CORE, "rollout.max_staleness=1", "placement=split"]
    step = Row("end to end", f"a step, {precision}", "s", against, 1 / 1.6)
    compiled = Row("end to end", "the same, compiled", "s", against, 1 / 1.6)
    ahead = Row("end to end", "and drawing ahead", "s", against, 1 / 2.5)
    products = Row("end to end", "the same", "s", "TRL's, its products by oneDNN too")
    learner = Row("end to end", f"memory of the learner, {precision}", "GiB", "TRL's process", 1.0)
    every = Row("end to end", f"memory of all processes, {precision}", "GiB", "TRL's process")
    with tempfile.TemporaryDirectory() as folder:
        spec = _trl_spec(config, folder, precision)
        for _ in range(repetitions):
            mine, other = _by_turns(step, config, ours, {}, spec)
            learner.add(mine["learner 0"], other["driver"])
            every.add(sum(mine.values()), other["driver"])
        yield from (step, learner, every)
        for _ in range(repetitions):
            _by_turns(compiled, config, fast, {}, spec)
        yield compiled
        rows = [(ahead, spec)]
        if precision == "float32":  # in others torch itself takes oneDNN
            rows.append((products, {**spec, "onednn": True}))
        for row, theirs in rows:
            for _ in range(repetitions):
                with slots() as cluster:
                    _by_turns(row, config, [*beside, f"cluster={cluster}"], environment, theirs)
            yield row


def _by_turns(
    row: Row,
    config: Config,
    ours: Sequence[str],
    environment: Mapping[str, str],
    spec: Mapping[str, Any],
) -> tuple[dict[str, float], dict[str, float]]:
    """Into ``row`` every step but the first, which also compiles and allocates, and the last, which
    exports and draws nothing ahead; returns the peak memory of both, see :func:`runs.watched`."""
    mine, other = dict[str, float](), dict[str, float]()
    trls = {"OMP_NUM_THREADS": str(config.learner.cpus), "HF_HUB_OFFLINE": "1"}
    with (
        tempfile.TemporaryDirectory() as records,
        contender("scripts.benchmarks.ours", [records, *ours], environment, mine) as we,
        contender("scripts.benchmarks.trl", [json.dumps(spec)], trls, other) as they,
    ):
        for number in range(config.steps):
            seconds = we.step()
            with all_else_stopped(they):
                others = they.step()
            if 0 < number < config.steps - 1:
                row.add(seconds, others)
    return mine, other


def _trl_spec(config: Config, folder: str, precision: Precision) -> dict[str, Any]:
    assert isinstance(config.teacher, VllmTeacherConfig | HfTeacherConfig)
    checked = preflight.check(config)
    prompts = PromptStream(checked.train, config.seed).take(config.prompts_per_step * config.steps)
    return {
        "student": materialize_student(config.student, "float32", Path(folder) / "student"),
        "teacher": expand(config.teacher.model),
        "prompts": [[{"role": r, "content": c} for r, c in p.messages] for p in prompts],
        "batch": config.prompts_per_step,
        "steps": config.steps,
        "tokens": config.rollout.max_tokens,
        "lr": config.learner.lr,
        "bf16": precision == "bfloat16",
        "onednn": False,
        "threads": config.learner.cpus,
        "directory": f"{folder}/trl",
    }
