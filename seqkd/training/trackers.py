"""Trackers of a run's metrics: TensorBoard, and the accelerate trackers of the configuration.

metrics.jsonl is complete without them, so a failing tracker does not stop a run.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Callable, Mapping
from os import environ
from pathlib import Path
from typing import Any

from seqkd.config.base import TrackerName
from seqkd.config.run import Config
from seqkd.errors import ConfigError
from seqkd.files import atomic_write
from seqkd.storage.run_directory import flat

PROJECT = "seqkd"


def check(names: tuple[TrackerName, ...]) -> None:
    """Raise ConfigError unless the package of each tracker is installed."""
    if not names:
        return
    from accelerate.tracking import get_available_trackers

    for name in names:
        if name not in map(str, get_available_trackers()):
            raise ConfigError(
                f"trackers: the package {name!r} is not installed. Run `pip install {name}`, or "
                f"remove {name} from trackers."
            )


class Tracker:
    """Tracker of accelerate. If it fails, it is dropped and the run continues."""

    def __init__(self, name: str, start: Callable[[], Any], say: Callable[[str], None]) -> None:
        """Start the tracker. ``start`` returns the started tracker, ``say`` prints a warning."""
        self.name, self.say = name, say
        self.tracker: Any = None
        self._attempt(lambda: setattr(self, "tracker", start()))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the values of one step. Non-finite values are omitted."""
        finite = {key: float(value) for key, value in values.items() if math.isfinite(value)}
        if self.tracker is not None:
            self._attempt(lambda: self.tracker.log(finite, step=step))

    def close(self) -> None:
        """Send the remaining values."""
        if self.tracker is not None:
            self._attempt(self.tracker.finish)
        self.tracker = None

    def _attempt(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # from the tracker's library, its network or its disk
            self.tracker = None
            reason = " ".join(str(error).split()) or type(error).__name__
            self.say(
                f"warning: {self.name} failed: {reason:.300}. The run continues without "
                f"{self.name}."
            )


class Trackers:
    """All trackers of one run."""

    def __init__(self, directory: Path, config: Config, say: Callable[[str], None]) -> None:
        """Create the trackers of the run in ``directory`` without starting them."""
        self.directory, self.config, self.say = directory, config, say
        self.board: Tracker | None = None
        self.named: list[Tracker] | None = None

    def begin(self, step: int) -> None:
        """Continue with ``step``. TensorBoard hides its values of this and later steps. The other
        trackers cannot go back, so they are started only once."""
        _ignore_launcher()
        if self.board is not None:
            self.board.close()
        self.board = Tracker("TensorBoard", lambda: _tensorboard(self.directory, step), self.say)
        if self.named is None:
            names = dict.fromkeys(self.config.trackers)
            self.named = [Tracker(name, self._starter(name), self.say) for name in names]

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the values of one step to all trackers."""
        for tracker in self._all():
            tracker.log(step, values)

    def close(self) -> None:
        """Send the remaining values."""
        for tracker in self._all():
            tracker.close()

    def _all(self) -> list[Tracker]:
        return ([self.board] if self.board else []) + (self.named or [])

    def _starter(self, name: TrackerName) -> Callable[[], Any]:
        return lambda: _start(name, self.directory / "trackers", self.config)


def _ignore_launcher() -> None:
    """Make accelerate's trackers treat the driver as the only process, without a device, even if
    the environment variables of a launcher are set."""
    from accelerate.state import PartialState
    from accelerate.utils import clear_environment

    with clear_environment():
        PartialState(cpu=True)


def _tensorboard(directory: Path, step: int) -> Any:
    from accelerate.tracking import TensorBoardTracker

    tracker = TensorBoardTracker("tensorboard", directory, purge_step=step or None)
    tracker.start()
    return tracker


def _start(name: TrackerName, folder: Path, config: Config) -> Any:
    """Start a tracker. A resumed run continues the tracker's run, whose id is in ``folder``."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    folder.mkdir(parents=True, exist_ok=True)
    id_file = folder / f"{name}.id"
    last_id = id_file.read_text(encoding="utf-8") if id_file.exists() else ""
    run_id = last_id or uuid.uuid4().hex
    if name == "mlflow":  # the default is the working directory, which Ray may delete after a job
        environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
    options: dict[TrackerName, dict[str, Any]] = {
        "mlflow": {"run_name": config.name, "run_id": last_id or None},
        "trackio": {
            "name": config.name,
            "resume": "allow" if last_id else "never",
            "config": _plain(config),  # otherwise a resumed run of trackio loses it
        },
        "wandb": {"name": config.name, "dir": str(folder), "id": run_id, "resume": "allow"},
    }
    tracker = LOGGER_TYPE_TO_CLASS[name](PROJECT, **options[name])
    tracker.start()
    if not last_id:
        atomic_write(id_file, tracker.tracker.info.run_id if name == "mlflow" else run_id)
        tracker.store_init_configuration(_plain(config))
    return tracker


def _plain(config: Config) -> dict[str, Any]:
    """Return all values by their dotted paths. Lists become JSON, which no tracker splits."""
    return {
        key: value if isinstance(value, str | int | float | None) else json.dumps(value)
        for key, value in flat(config).items()
    }
