"""Disturb a run while it trains, and compare its output with that of an undisturbed run:
python -m tests.chaos.chaos --kills 50 --seed 0

Its data has fewer prompts than the run needs, so that prompts repeat within the replay log.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import psutil

from actors.local_cluster import ENVIRONMENT, RAY, Head, free_ports, local_head
from seqkd.config.run import load as load_config
from seqkd.console import print_message
from seqkd.files import file_digest
from seqkd.storage.metrics_file import read_rows
from tests.chaos import endpoint

ROOT = Path(__file__).resolve().parents[2]

ROLES = {
    "rollout": "RolloutActor",
    "teacher": "TeacherActor",
    "learner": "LearnerRank",
}
RAY_PROCESSES = {"gcs": "gcs_server", "raylet": "raylet"}
"""Names of the processes of Ray's head."""
FAULTS = (
    *(("kill", role) for role in ROLES),
    *(("hang", role) for role in ROLES),
    ("slow", "rollout"),
    ("slow", "learner"),
    ("cut", "rollout"),
    ("cut", "learner"),
    ("kill", "driver"),
    ("stop", "driver"),
    ("kill", "gcs"),
    ("kill", "raylet"),
    ("flip", "teacher"),
    ("flip", "student"),
    ("flip", "checkpoint"),
    ("foreign", "checkpoint"),
    ("second", "driver"),
)
"""Kinds of faults, with the affected role.

- kill: SIGKILL
- hang: SIGSTOP
- slow: SIGSTOP for two seconds
- cut: destroys the TCP connections of the process (by `ss -K`, which requires root)
- stop: SIGTERM
- flip: kills the driver and flips one bit of a model or of the newest checkpoint. A changed model
  must be refused, and is repaired. A damaged checkpoint must be skipped.
- foreign: kills the driver and copies the newest checkpoint of another run. It must be skipped.
- second: starts a second driver on the same run directory. It must be refused.

After the loss of Ray's head, a new head is started. A driver that has ended is started again with
--resume.
"""
ENDPOINT_FAULTS = (
    *(("answer", fault) for fault in endpoint.FAULTS),
    ("kill", "driver"),
    ("stop", "driver"),
)
"""Kinds of faults of a run with a teacher behind an endpoint; see :mod:`tests.chaos.endpoint`."""
STAGES = (
    "RolloutActor.load", "RolloutActor.sample", "RolloutActor.logprobs", "TeacherActor.score",
    "LearnerRank.measure", "LearnerRank.step", "LearnerRank.publish", "LearnerRank.save",
)  # fmt: skip
"""Calls that an actor may be running, as shown in the name of Ray's process."""
OVERRIDES = (
    "recovery={restarts: 1000, backoff_s: 0.1, heartbeat_s: 8, stall_s: 90}",
    "checkpoints={every_steps: 5, keep_last: 2}",
    "evaluation.prompts=4",
    "data.rows=6",
)
PATIENCE_S = 600
"""Seconds without a step after which a run counts as hung."""


def main() -> int:
    """Return 0 if all invariants hold, else 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", nargs="?", default=str(ROOT / "configs" / "tiny.yaml"))
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--nodes",
        type=int,
        default=1,
        choices=(1, 2),
        help="number of nodes; with 2, the second node is killed too",
    )
    parser.add_argument(
        "--stages",
        action="store_true",
        help="instead of --kills: kill the driver after each of 10 steps, and in every stage",
    )
    parser.add_argument(
        "--endpoint", action="store_true", help="faults of a teacher behind an endpoint"
    )
    parser.add_argument("--directory", type=Path, default=ROOT / "runs" / "chaos")
    args = parser.parse_intermixed_args()
    shutil.rmtree(args.directory, ignore_errors=True)
    args.directory.mkdir(parents=True)
    kinds = ENDPOINT_FAULTS if args.endpoint else FAULTS
    stages = ("",) if args.endpoint else STAGES  # the endpoint has no stages
    faults = driver_faults() if args.stages else schedule(args.kills, args.seed, kinds, stages)
    # Steps with an endpoint take a tenth of a second, so that some pass during a fault.
    steps = 10 if args.stages else (30 if args.endpoint else 2) * args.kills
    overrides = [*OVERRIDES, f"steps={steps}", f"runs_dir={args.directory}"]
    overrides += ["placement=split"] if args.nodes == 2 else []
    with endpoint.serve() as server:
        models = [] if args.endpoint else copied_models(args.config, args.directory / "models")
        overrides += endpoint.overrides(server) if args.endpoint else models
        command = [sys.executable, "-m", "seqkd", "train", args.config, *overrides, *args.overrides]
        print("undisturbed run", flush=True)
        with Cluster(args.nodes) as ray:
            Trial([*command, "name=quiet"], args.directory / "quiet", ray).finish()
        print(f"run with {len(faults)} faults", flush=True)
        begun = time.monotonic()
        with Cluster(args.nodes) as ray:
            run = Trial([*command, "name=chaos"], args.directory / "chaos", ray, server)
            disturb(run, faults, random.Random(args.seed))
            run.finish()
            problems = run.problems + left_behind(run)
    problems += differences(args.directory / "quiet", args.directory / "chaos")
    report(run, time.monotonic() - begun, problems)
    return 1 if problems else 0


def copied_models(config: str, folder: Path) -> list[str]:
    """Copy both models, whose files the faults change, and return the overrides for the copies."""
    read = load_config(config)
    paths = {"teacher": read.teacher.model, "student": read.student.model}
    for name, path in paths.items():
        shutil.copytree(Path(path).expanduser(), folder / name, symlinks=False)
    return [f"{name}.model={folder / name}" for name in paths]


@dataclass(frozen=True)
class Fault:
    """Fault with the affected role and its time."""

    step: int
    """Number of steps before it."""
    what: str
    role: str
    stage: str = ""
    """If set, the fault waits until an actor runs this call."""
    delay: float = 0.0
    """Seconds to wait after that."""

    def __str__(self) -> str:
        return f"{self.what} {self.role}" + (f" in {self.stage}" if self.stage else "")


def schedule(
    faults: int, seed: int, kinds: Sequence[tuple[str, str]], stages: Sequence[str]
) -> list[Fault]:
    """Return one fault per step. All kinds occur about equally often in random order, half of them
    in a stage and half of them at a random time."""
    generator = random.Random(seed)
    kinds = [kinds[i % len(kinds)] for i in range(faults)]
    generator.shuffle(kinds)
    return [
        Fault(step, *kind, generator.choice(stages), generator.uniform(0, 0.02))
        if generator.random() < 0.5
        else Fault(step, *kind, delay=generator.uniform(0, 0.5))
        for step, kind in enumerate(kinds, 1)
    ]


def driver_faults() -> list[Fault]:
    """Return faults that kill the driver after each step, and once in every stage."""
    after = [Fault(step, "kill", "driver") for step in range(1, 10)]
    within = [Fault(1 + i, "kill", "driver", stage) for i, stage in enumerate(STAGES)]
    return sorted([*after, *within], key=lambda fault: fault.step)


class Cluster:
    """A Ray cluster on this machine, with one node or two. Its head has enough cores for all
    actors, so that it can replace the actors of a lost node."""

    def __init__(self, nodes: int) -> None:
        self.nodes, self.stack = nodes, ExitStack()
        self.second: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.head = self.stack.enter_context(local_head(ENVIRONMENT, "--num-cpus=4"))
        if self.nodes == 2:
            self.second = second_node(self.head)
            self.stack.callback(self.second.wait)
            self.stack.callback(self.second.terminate)
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def kill(self, process: str) -> bool:
        """Kill a process of the head. Returns False if there is none."""
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                if child.name() == RAY_PROCESSES[process]:
                    child.kill()
                    return True
        return False

    def restart(self) -> None:
        """Start a new head in place of a lost one."""
        self.stack.close()
        self.__enter__()


def second_node(head: Head) -> subprocess.Popen[bytes]:
    """Start a second node with two cores."""
    manager, objects = free_ports(2)
    return subprocess.Popen(
        [
            *(RAY, "start", f"--address={head.cluster}", "--block", "--num-cpus=2"),
            *("--node-ip-address=127.0.0.1", "--disable-usage-stats"),
            *(f"--node-manager-port={manager}", f"--object-manager-port={objects}"),
            "--dashboard-agent-listen-port=0",
        ],
        env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


@dataclass
class Trial:
    """Run that is restarted until it is done."""

    command: list[str]
    directory: Path
    ray: Cluster
    server: endpoint.Server | None = None
    done: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    seen: set[psutil.Process] = field(default_factory=set)
    """All processes of the run so far."""

    def __post_init__(self) -> None:
        self.log = self.directory.with_suffix(".log")
        self.out = self.log.open("wb")
        self.begin()

    def begin(self) -> None:
        """Start the driver, which continues from the newest checkpoint."""
        self.begun_at = self.log.stat().st_size
        self.driver = self.start()
        self.seen.add(psutil.Process(self.driver.pid))

    def start(self) -> subprocess.Popen[bytes]:
        """Start a driver without waiting for it."""
        command = [*self.command, f"cluster={self.ray.head.cluster}", "--resume"]
        return subprocess.Popen(
            command, cwd=ROOT, env=ENVIRONMENT, stdout=self.out, stderr=self.out
        )

    def printed(self) -> str:
        """Return the output since the last start of the driver."""
        return self.log.read_bytes()[self.begun_at :].decode()

    def kill(self) -> None:
        """Kill the driver and wait for its end."""
        self.driver.kill()
        self.driver.wait()

    def refused(self, driver: subprocess.Popen[bytes], text: str) -> None:
        """Require that a driver ends with exit code 2 and prints ``text``."""
        code = driver.wait(PATIENCE_S)
        printed = self.printed()
        if code != 2 or text not in printed or "Traceback" in printed:
            self.problems.append(f"exit code {code} without {text!r}: {printed[-500:]}")

    def steps(self) -> int:
        """Return the number of rows of metrics."""
        metrics = self.directory / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    def reach(self, steps: int) -> bool:
        """Wait for a number of steps. Returns False if the run ended before."""
        last, since = -1, time.monotonic()
        while (running := self.driver.poll() is None) and (now := self.steps()) < steps:
            if now != last:
                last, since = now, time.monotonic()
            if time.monotonic() - since > PATIENCE_S:
                sys.exit(f"error: no step within {PATIENCE_S} s. See {self.log}.")
            time.sleep(0.02)
        return running

    def at(self, stage: str) -> bool:
        """Wait until an actor runs ``stage``, for at most a minute. Returns False if the run ended
        before."""
        looked = time.monotonic()
        until = looked + 60
        actors = [p for role in ROLES for p in self.processes(role)]
        while stage and time.monotonic() < until and not any(is_actor(p, stage) for p in actors):
            if self.driver.poll() is not None:
                return False
            time.sleep(0.001)
            if time.monotonic() - looked > 1:  # some may have been replaced
                looked = time.monotonic()
                actors = [p for role in ROLES for p in self.processes(role)]
        return True

    def finish(self) -> None:
        """Wait for the end of the run. A driver that a fault ended is restarted."""
        while True:
            self.reach(sys.maxsize)
            if not self.restart():
                return

    def restart(self) -> bool:
        """Wait for the driver and restart it. Returns False if the run is done."""
        code = self.driver.wait(PATIENCE_S)
        if code == 0:
            return False
        if code not in (-signal.SIGKILL, 128 + signal.SIGTERM):
            sys.exit(f"error: the run ended with exit code {code}. See {self.log}.")
        self.begin()
        return True

    def processes(self, role: str) -> list[psutil.Process]:
        """Return the living processes of a role."""
        if role == "driver":
            return [psutil.Process(self.driver.pid)]
        children = psutil.Process().children(recursive=True)
        actors = [p for p in children if is_actor(p, ROLES[role])]
        self.seen.update(actors)
        return actors


def is_actor(process: psutil.Process, name: str) -> bool:
    """Return True if the process is a Ray actor of the class ``name``."""
    try:
        return process.cmdline()[0].startswith(f"ray::{name}")
    except (psutil.Error, IndexError):  # the process has just ended
        return False


def disturb(run: Trial, faults: list[Fault], generator: random.Random) -> None:
    """Apply the faults in order."""
    for number, fault in enumerate(faults, 1):
        while not (run.reach(fault.step) and run.at(fault.stage)):
            if not run.restart():
                return
        time.sleep(fault.delay)
        if run.ray.second and number == len(faults) // 2:
            kill_node(run.ray.second)
            run.done["kill node"] += 1
            print("  kill node", flush=True)
        there = strike(run, fault, generator)
        run.done[f"{fault.what} {fault.role}"] += there
        missed = "" if there else ": not possible"
        print(f"{number:>4}/{len(faults)} after step {run.steps()}: {fault}{missed}", flush=True)


def strike(run: Trial, fault: Fault, generator: random.Random) -> int:
    """Apply one fault. Returns 1 if it was possible, else 0."""
    if fault.what == "answer":
        assert run.server
        run.server.break_next(fault.role)
        return 1
    if fault.what in ("flip", "foreign"):
        return damage(run, fault, generator)
    if fault.what == "second":
        run.refused(run.start(), "is in use by a running process")
        return 1
    if fault.role in RAY_PROCESSES:
        there = run.ray.kill(fault.role)
        run.driver.wait(PATIENCE_S)
        run.ray.restart()
        run.begin()
        return int(there)
    until = time.monotonic() + 180
    while not (there := run.processes(fault.role)):  # the process may be restarting
        if time.monotonic() > until or (run.driver.poll() is not None and not run.restart()):
            return 0
        time.sleep(0.1)
    victim = generator.choice(sorted(there, key=lambda p: p.pid))
    if fault.what == "cut":
        return cut(victim)
    number = {"kill": signal.SIGKILL, "stop": signal.SIGTERM}.get(fault.what, signal.SIGSTOP)
    with suppress(psutil.NoSuchProcess):  # the process has ended or was replaced
        victim.send_signal(number)
        if fault.what == "slow":
            time.sleep(2)
            victim.send_signal(signal.SIGCONT)
    return 1


def damage(run: Trial, fault: Fault, generator: random.Random) -> int:
    """Kill the driver, damage a file or add a foreign checkpoint, and resume."""
    saved = sorted((run.directory / "checkpoints").glob("step-*"))
    if fault.role == "checkpoint" and len(saved) < 2:  # no earlier checkpoint to continue from
        return 0
    run.kill()
    if fault.what == "foreign":
        other = sorted((run.directory.parent / "quiet" / "checkpoints").glob("step-*"))[-1]
        shutil.copytree(other, saved[-1].parent / "step-00099999")
        run.begin()
        run.reach(run.steps() + 1)
        if "belongs to another run" not in run.printed():
            run.problems.append("a checkpoint of another run was not reported")
        return 1
    if fault.role == "checkpoint":
        files = sorted(f for f in saved[-1].rglob("*") if f.is_file() and f.stat().st_size)
        flip(generator.choice(files), generator)
        run.begin()
        run.reach(run.steps() + 1)
        if saved[-1].name not in run.printed():
            run.problems.append(f"a changed bit in {saved[-1]} was not reported")
        return 1
    file = run.directory.parent / "models" / fault.role / "model.safetensors"
    repair = flip(file, generator)
    run.begin()
    run.refused(run.driver, file.name)
    repair()
    run.begin()
    return 1


def flip(file: Path, generator: random.Random) -> Callable[[], object]:
    """Flip one bit of a file. Returns a function that restores it."""
    before = file.read_bytes()
    after = bytearray(before)
    after[generator.randrange(len(after))] ^= 1 << generator.randrange(8)
    file.write_bytes(after)
    return lambda: file.write_bytes(before)


def cut(victim: psutil.Process) -> int:
    """Destroy the TCP connections of a process. Returns 1 if there were connections and the
    operation was permitted."""
    destroyed = 0
    for connection in victim.net_connections("tcp"):
        if connection.status == psutil.CONN_ESTABLISHED:
            ends = [f"sport = :{connection.laddr.port}", f"dport = :{connection.raddr.port}"]
            done = subprocess.run(
                ["ss", "-K", "-t", f"( {' and '.join(ends)} )"],
                check=False, capture_output=True, text=True,
            )  # fmt: skip
            destroyed += done.returncode == 0 and "ESTAB" in done.stdout
    return int(destroyed > 0)


def kill_node(node: subprocess.Popen[bytes]) -> None:
    """Kill all processes of a Ray node at once, as if a machine failed."""
    children = psutil.Process(node.pid).children(recursive=True)
    for process in [psutil.Process(node.pid), *children]:
        process.kill()


def left_behind(run: Trial) -> list[str]:
    """Return the processes and partial files that remain after the run."""
    for role in ROLES:
        run.processes(role)
    _, alive = psutil.wait_procs(list(run.seen), timeout=30)
    halves = [str(path) for path in run.directory.rglob("*.partial")]
    return [f"left behind: {thing}" for thing in (*alive, *halves)]


def differences(quiet: Path, chaos: Path) -> list[str]:
    """Return the differences between the outputs of the disturbed and the undisturbed run."""
    rows = [read_rows(run / "metrics.jsonl")[0] for run in (quiet, chaos)]
    problems = []
    if [row["step"] for row in rows[1]] != list(range(len(rows[0]))):
        problems.append(f"metrics have gaps: {[row['step'] for row in rows[1]]}")
    for before, after in zip(*rows, strict=False):
        for key in before:
            if not timed(key) and before[key] != after.get(key):
                problems.append(f"step {before['step']}: {key} {before[key]} -> {after.get(key)}")
    if file_digest(quiet / "student/model.safetensors") != file_digest(
        chaos / "student/model.safetensors"
    ):
        problems.append("the students' weights differ")
    return problems


def timed(key: str) -> bool:
    """Return True if a metric depends on the clock, or counts since the start of a process."""
    counts = ("teacher_requests", "teacher_unreadable", "teacher_refused", "teacher_prompt_tokens",
              "teacher_completion_tokens")  # fmt: skip
    return key.startswith("time_") or key in ("tokens_per_s", *counts)


def report(run: Trial, seconds: float, problems: list[str]) -> None:
    """Print the faults and the problems."""
    print("\nfaults:")
    for name, count in sorted(run.done.items()):
        print(f"  {count:>3} {name}")
    for problem in problems[:20]:
        print_message("error", problem)
    print(
        f"{run.done.total()} faults survived in {seconds:.0f} s. Steps with different samples: "
        f"{sum('samples' in p for p in problems)}, problems in total: {len(problems)}"
    )


if __name__ == "__main__":
    sys.exit(main())
