"""The run directory: where it is, that it holds one run only, and what a resumed run may change."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seqkd.config.run import Config, dump, load
from seqkd.errors import ConfigError
from seqkd.files import atomic_write

PACKAGED = "working_dir_files"
"""A folder in the path of every working directory that Ray unpacks for a job."""
STARTUP_FILES = (
    "config.yaml", "data.json", "environment.json", "evaluation.json", "lock", "report.html",
    "student_initial", "student_initial.partial", "student_initial.old", "tensorboard", "trackers",
    "replay_log",
)  # fmt: skip
"""What a run writes before its first step: a start that failed there may be tried again."""
EXECUTION_KEYS = {
    "name", "runs_dir", "trackers", "cluster", "placement", "examples", "every_steps", "actors",
    "cpus", "gpus", "ranks", "zero_stage", "gradient_checkpointing", "compile",
    "micro_batch_tokens", "tensor_parallel_size",
    "kv_cache_gib", "gpu_memory_utilization", "max_num_seqs", "enforce_eager", "batch_tokens",
    "base_url", "api_key_env", "concurrency", "timeout_s", "max_retries",
}  # fmt: skip
"""Keys that say how a run is carried out, in whatever section; and every key of SECTIONS."""
SECTIONS = ("checkpoints", "recovery", "alarms")
TRAJECTORY_KEYS = {
    "steps", "budget", "budget.kind", "budget.amount", "learner.lr", "learner.schedule",
    "learner.lr_warmup_steps", "learner.min_lr_ratio", "learner.betas",
    "learner.weight_decay", "learner.max_grad_norm", "learner.precision",
    "rollout.precision",
}  # fmt: skip
"""Fields that change what the next steps do, which a user may want under way."""


@dataclass(frozen=True)
class Resumption:
    """State of the run directory that a start finds."""

    exists: bool
    """Whether the run has begun before; else it begins now."""
    changes: tuple[str, ...] = ()
    """A line for each changed field."""
    trajectory: tuple[str, ...] = ()
    """Changed fields that change what the next steps do, so that samples drawn since the last
    checkpoint are those of another student."""


def locate(config: Config) -> Path:
    """``runs_dir/name``. A relative ``runs_dir`` is taken from the working directory; within a
    job whose working directory is a copy that Ray will delete, from ~/seqkd."""
    runs = Path(config.runs_dir).expanduser()
    if not runs.is_absolute() and PACKAGED in Path.cwd().parts:
        runs = Path.home() / "seqkd" / runs
    return (runs / config.name).absolute()


def refuse_used(directory: Path) -> None:
    """ConfigError where another run, or anything else, is already there."""
    entries = directory.iterdir() if directory.is_dir() else ()
    metrics = directory / "metrics.jsonl"
    if any(
        path.name not in STARTUP_FILES and (path != metrics or path.stat().st_size)
        for path in entries
    ):
        raise ConfigError(
            f"name: {directory} already holds another run. Choose a new name=…, or remove it; "
            "to go on with it, use --resume."
        )


@contextmanager
def lock(directory: Path) -> Iterator[None]:
    """Make the directory, and keep other processes from it while the block runs."""
    with _written(directory):
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / "lock").open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"name: {directory} is that of a run that is under way. Stop it first, or choose "
                "a new name=…."
            ) from None
        except OSError:  # a file system without locks
            pass
        yield


def under_way(directory: Path) -> bool | None:
    """Whether a process holds the directory; None where its file system does not tell."""
    try:
        with (directory / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, FileNotFoundError) as error:
        return isinstance(error, BlockingIOError)
    except OSError:
        return None
    return False


def initialize(directory: Path, config: Config, data: Mapping[str, Sequence[Any]]) -> None:
    """Write the resolved configuration, the fingerprint of the data and the environment into the
    directory."""
    from seqkd.storage import environment  # here, as it imports torch

    atomic_write(directory / "data.json", json.dumps(_fingerprint(data), indent=2))
    atomic_write(directory / "environment.json", json.dumps(environment.describe(), indent=2))
    atomic_write(directory / "config.yaml", dump(config))


def resumption(directory: Path, config: Config, resume: bool) -> Resumption:
    """What a start, told to ``resume`` or not, finds in the directory. ConfigError where there is a
    run that it may not begin anew, or whose steps so far would not be those of ``config``."""
    file = directory / "config.yaml"
    if not resume or not file.exists():
        refuse_used(directory)
        return Resumption(exists=False)
    before, now = flat(load(file)), flat(config)
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    lines = {key: f"{key}: {_shown(before, key)} -> {_shown(now, key)}" for key in changed}
    trajectory = [key for key in changed if key in TRAJECTORY_KEYS]
    free = [key for key in changed if _operation(key)]
    refused = [lines[key] for key in changed if key not in trajectory and key not in free]
    if before["steps"] > config.steps:
        refused.append(f"{lines['steps']} (only more)")
    if refused:
        raise ConfigError(
            f"--resume: {directory} is a run of another configuration:\n"
            + "".join(f"  {line}\n" for line in refused)
            + "Set these as they were, or choose a new name=…."
        )
    return Resumption(True, tuple(lines.values()), tuple(trajectory))


def refuse_other_data(directory: Path, data: Mapping[str, Sequence[Any]]) -> None:
    """ConfigError unless ``data`` is what the run in ``directory`` began with: its steps are
    counted through the prompts in their order."""
    file = directory / "data.json"
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
        before = {name: before[name] for name in data}
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"--resume: {file}, which says what data the run began with, is missing or damaged. "
            "Choose a new name=…."
        ) from None
    for name, now in _fingerprint(data).items():
        if now != before[name]:
            raise ConfigError(
                f"--resume: data: the {name} prompts are not those with which {directory} began: "
                f"{before[name]['prompts']} then, {now['prompts']} now, with other content. Put "
                "the data set back as it was, or choose a new name=…."
            )


def _fingerprint(data: Mapping[str, Sequence[Any]]) -> dict[str, dict[str, Any]]:
    return {
        name: {"prompts": len(prompts), "digest": getattr(prompts, "digest", str)()}
        for name, prompts in data.items()
    }


def flat(config: Config) -> dict[str, Any]:
    """Every value of a configuration by its dotted path."""

    def walk(value: Any, path: str) -> Iterator[tuple[str, Any]]:
        if not isinstance(value, dict) or not value:
            yield path, value
            return
        for key, below in value.items():
            yield from walk(below, f"{path}.{key}" if path else key)

    return dict(walk(config.model_dump(mode="json"), ""))


def _operation(key: str) -> bool:
    section, *_, last = key.split(".") if "." in key else (key, key)
    return section in SECTIONS or last in EXECUTION_KEYS


def _shown(values: Mapping[str, Any], key: str) -> str:
    return str(values[key]) if key in values else "(none)"


@contextmanager
def _written(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"runs_dir: {directory} cannot be written: {error.strerror}. Name another directory."
        ) from None
