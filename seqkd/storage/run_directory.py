"""The run directory: its location, its lock, and the changes that a resumed run may make."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from seqkd.config.run import Config, dump, load
from seqkd.errors import ConfigError
from seqkd.files import atomic_write

PACKAGED = "working_dir_files"
"""Folder in the path of every working directory that Ray unpacks for a job."""
STARTUP_FILES = (
    "config.yaml", "data.json", "environment.json", "evaluation.json", "lock", "models.json",
    "report.html", "run_id", "student_initial", "student_initial.partial", "student_initial.old",
    "tensorboard", "trackers", "replay_log",
)  # fmt: skip
"""Files that a run writes before its first step. A directory with only these files may be reused,
so a failed start can be repeated."""
EXECUTION_KEYS = {
    "name", "runs_dir", "trackers", "cluster", "placement", "examples", "every_steps", "actors",
    "cpus", "gpus", "ranks", "zero_stage", "gradient_checkpointing", "compile",
    "micro_batch_tokens", "tensor_parallel_size",
    "kv_cache_gib", "gpu_memory_utilization", "max_num_seqs", "enforce_eager", "batch_tokens",
    "base_url", "api_key_env", "concurrency", "timeout_s", "max_retries",
}  # fmt: skip
"""Keys, in any section, that affect how a run is executed and not what it computes."""
SECTIONS = ("checkpoints", "recovery", "alarms")
"""Sections whose keys all affect execution only."""
TRAJECTORY_KEYS = {
    "steps", "budget", "budget.kind", "budget.amount", "learner.lr", "learner.schedule",
    "learner.lr_warmup_steps", "learner.min_lr_ratio", "learner.betas",
    "learner.weight_decay", "learner.max_grad_norm", "learner.precision",
    "rollout.precision",
}  # fmt: skip
"""Keys that change the following steps and may be changed when a run is resumed."""


Models = Mapping[str, Mapping[str, Any]]
"""Models and the digests of their files (:func:`seqkd.models.model_files.identify`)."""


@dataclass(frozen=True)
class Resumption:
    """State of the run directory at the start of a command."""

    exists: bool
    """True if the run has started before; False if it starts now."""
    changes: tuple[str, ...] = ()
    """One line per changed key."""
    trajectory: tuple[str, ...] = ()
    """Changed keys that change the following steps. Samples drawn since the last checkpoint are
    then those of another student."""


def locate(config: Config) -> Path:
    """Return the path ``runs_dir/name``. A relative ``runs_dir`` is relative to the working
    directory. In a Ray job, whose working directory is a temporary copy, it is relative to
    ~/seqkd."""
    runs = Path(config.runs_dir).expanduser()
    if not runs.is_absolute() and PACKAGED in Path.cwd().parts:
        runs = Path.home() / "seqkd" / runs
    return (runs / config.name).absolute()


def refuse_used(directory: Path) -> None:
    """Raise ConfigError if the directory contains another run or any other files."""
    entries = directory.iterdir() if directory.is_dir() else ()
    metrics = directory / "metrics.jsonl"
    if any(
        path.name not in STARTUP_FILES and (path != metrics or path.stat().st_size)
        for path in entries
    ):
        run = any((directory / name).exists() for name in ("config.yaml", "metrics.jsonl"))
        raise ConfigError(
            f"name: {directory} already contains "
            + ("another run" if run else "other files")
            + ". Choose a new name=…, or remove the directory"
            + (", or continue the run with --resume." if run else ".")
        )


@contextmanager
def lock(directory: Path) -> Iterator[None]:
    """Create the directory and lock it against other processes while the block runs.

    If nothing else was written, all created directories are removed again. Raises ConfigError if
    another process has locked it.
    """
    file = directory / "lock"
    created = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    with _written(directory):
        directory.mkdir(parents=True, exist_ok=True)
        lock = file.open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(lock.fileno()).st_nlink:  # removed by its previous owner just now
                raise BlockingIOError
        except BlockingIOError:
            raise ConfigError(
                f"name: {directory} is in use by a running process. Stop that run first, or choose "
                "a new name=…."
            ) from None
        except OSError:  # a file system without locks
            pass
        try:
            yield
        finally:
            if [path.name for path in directory.iterdir()] == [file.name]:
                file.unlink()
                with suppress(OSError):  # another run has written into a parent
                    for folder in created:
                        folder.rmdir()


def under_way(directory: Path) -> bool | None:
    """Return whether a process has locked the directory; None if its file system has no locks."""
    try:
        with (directory / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, FileNotFoundError) as error:
        return isinstance(error, BlockingIOError)
    except OSError:
        return None
    return False


def run_id(directory: Path) -> str:
    """Return the random id of the run in the directory, which is created at the first call."""
    file = directory / "run_id"
    if not file.exists():
        atomic_write(file, uuid4().hex)
    return file.read_text()


def initialize(
    directory: Path, config: Config, data: Mapping[str, Sequence[Any]], models: Models | None
) -> None:
    """Write the resolved configuration, the fingerprint of the data and the environment into the
    directory, and, unless the run is resumed, the digests of the models."""
    from seqkd.storage import environment  # here, as it imports torch

    if models is not None:
        atomic_write(directory / "models.json", json.dumps(models, indent=2))
    atomic_write(directory / "data.json", json.dumps(_fingerprint(data), indent=2))
    atomic_write(directory / "environment.json", json.dumps(environment.describe(), indent=2))
    atomic_write(directory / "config.yaml", dump(config))


def resumption(directory: Path, config: Config, resume: bool) -> Resumption:
    """Compare the directory with ``config`` at the start of a command, with or without ``resume``.

    Raises ConfigError if the directory contains a run and ``resume`` is false, or if ``config``
    differs in keys that would have changed the steps taken so far."""
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
        refused.append(f"{lines['steps']} (can only increase)")
    if refused:
        raise ConfigError(
            f"--resume: {directory} is a run with another configuration. Restore these values, or "
            "choose a new name=…." + "".join(f"\n  {line}" for line in refused)
        )
    return Resumption(True, tuple(lines.values()), tuple(trajectory))


def refuse_other_data(directory: Path, data: Mapping[str, Sequence[Any]]) -> None:
    """Raise ConfigError if ``data`` differs from the data that the run in ``directory`` started
    with. The position of a run is a step count through the prompts in their order."""
    file = directory / "data.json"
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
        before = {name: before[name] for name in data}
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"--resume: {file}, the fingerprint of the run's data, is missing or damaged. "
            "Choose a new name=…."
        ) from None
    for name, now in _fingerprint(data).items():
        if now != before[name]:
            raise ConfigError(
                f"--resume: data: the {name} prompts have changed since {directory} started: "
                f"{before[name]['prompts']} then, {now['prompts']} now, with different content. "
                "Restore the data set, or choose a new name=…."
            )


def refuse_other_models(directory: Path, models: Models) -> None:
    """Raise ConfigError if a file of the models differs from those that the run in ``directory``
    started with."""
    file = directory / "models.json"
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
        files = {name: {**before[name]["files"]} for name in models}
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"--resume: {file}, the digests of the run's models, is missing or damaged. "
            "Choose a new name=…."
        ) from None
    lines = []
    for name, model in models.items():
        old, new = files[name], model["files"]
        for changed in (n for n in {**old, **new} if old.get(n) != new.get(n)):
            state = "is new" if changed not in old else "has other content"
            state = state if changed in new else "is missing"
            lines.append(f"  {name}: {Path(model['model']) / changed} {state}\n")
    if lines:
        raise ConfigError(
            f"--resume: files of the models have changed since {directory} started:\n"
            + "".join(lines)
            + "Restore these files, or choose a new name=…."
        )


def _fingerprint(data: Mapping[str, Sequence[Any]]) -> dict[str, dict[str, Any]]:
    return {
        name: {"prompts": len(prompts), "digest": getattr(prompts, "digest", str)()}
        for name, prompts in data.items()
    }


def flat(config: Config) -> dict[str, Any]:
    """Return every value of a configuration by its dotted path."""

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
            f"runs_dir: {directory} cannot be written: {error.strerror}. Set another directory."
        ) from None
