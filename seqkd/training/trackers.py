"""Where a run is watched: TensorBoard, and the trackers of accelerate that the configuration names.

metrics.jsonl is whole without them, so none of them can end a run.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Callable, Mapping
from operator import attrgetter
from os import environ
from pathlib import Path
from typing import Any

from seqkd.config.base import TrackerName
from seqkd.config.run import Config
from seqkd.errors import ConfigError
from seqkd.storage.run_directory import flat

PROJECT = "seqkd"
PACKAGES = {"comet_ml": "comet-ml", "aim": "'aim<4'"}
"""What to install for a tracker; the others have their package's name."""


def check(names: tuple[TrackerName, ...]) -> None:
    """ConfigError where the package of a tracker is not installed."""
    if not names:
        return
    from accelerate.tracking import get_available_trackers

    for name in names:
        if name not in map(str, get_available_trackers()):
            package = PACKAGES.get(name, name)
            raise ConfigError(
                f"trackers: {name!r} needs a package that is not installed here. Install it (pip "
                f"install {package}), or leave it out of trackers."
            )


class Tracker:
    """One tracker of accelerate. Where it fails it is closed, and the run goes on."""

    def __init__(self, name: str, start: Callable[[], Any], say: Callable[[str], None]) -> None:
        """``start`` makes it and starts it."""
        self.name, self.say = name, say
        self.tracker: Any = None
        self._attempt(lambda: setattr(self, "tracker", start()))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Values of one step; those that are no finite numbers are left out."""
        known = {key: float(value) for key, value in values.items() if math.isfinite(value)}
        if self.tracker is not None:
            self._attempt(lambda: self.tracker.log(known, step=step))

    def close(self) -> None:
        """Send what is left."""
        if self.tracker is not None:
            self._attempt(self.tracker.finish)
        self.tracker = None

    def _attempt(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # whatever its library, network or disk met
            self.tracker = None
            reason = " ".join(str(error).split()) or type(error).__name__
            self.say(
                f"warning: {self.name} failed: {reason:.300}. The run goes on without {self.name}."
            )


class Trackers:
    """Every tracker of one run."""

    def __init__(self, directory: Path, config: Config, say: Callable[[str], None]) -> None:
        """None is started yet. ``directory`` is the run's."""
        self.directory, self.config, self.say = directory, config, say
        self.board: Tracker | None = None
        self.named: list[Tracker] | None = None

    def begin(self, step: int) -> None:
        """Go on with ``step``: what TensorBoard has of it and later is hidden. The others are
        started the first time, and know no way back."""
        _alone()
        if self.board is not None:
            self.board.close()
        self.board = Tracker("TensorBoard", lambda: _tensorboard(self.directory, step), self.say)
        if self.named is None:
            names = dict.fromkeys(self.config.trackers)
            self.named = [Tracker(name, self._starter(name), self.say) for name in names]

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Values of one step, to each of them."""
        for tracker in self._all():
            tracker.log(step, values)

    def close(self) -> None:
        """Send what is left."""
        for tracker in self._all():
            tracker.close()

    def _all(self) -> list[Tracker]:
        return ([self.board] if self.board else []) + (self.named or [])

    def _starter(self, name: TrackerName) -> Callable[[], Any]:
        return lambda: _start(name, self.directory / "trackers", self.config)


def _alone() -> None:
    """accelerate's trackers ask which of several processes they are in. The driver is one, whatever
    a launcher has put into its environment, and it needs no device."""
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
    """A tracker's run: the one that this run began, where the tracker can go on with one. Its id is
    kept in ``folder``."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / f"{name}.id"
    before = kept.read_text(encoding="utf-8") if kept.exists() else ""
    again, identity = bool(before), before or uuid.uuid4().hex
    make = LOGGER_TYPE_TO_CLASS[name]
    place = (str(folder),) if make.requires_logging_directory else ()
    if name == "mlflow":  # else in the working directory, which may be a copy that Ray deletes
        environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
    tracker = make(PROJECT, *place, **_options(name, config.name, folder, identity, again))
    tracker.start()
    if not again:
        given = {"mlflow": "info.run_id", "aim": "hash"}.get(name)
        kept.write_text(attrgetter(given)(tracker.tracker) if given else identity, encoding="utf-8")
        if name == "comet_ml":
            tracker.tracker.set_name(config.name)
        tracker.store_init_configuration(_plain(config))
    return tracker


def _options(
    name: TrackerName, run: str, folder: Path, identity: str, again: bool
) -> dict[str, Any]:
    """Keyword arguments of a tracker: the run's name, where its files go, and what makes it go on
    with the run that has ``identity``. mlflow and aim give that themselves to a new one."""
    where, known = str(folder), identity if again else None
    options: dict[TrackerName, dict[str, Any]] = {
        "aim": {"experiment": run, "run_hash": known, "force_resume": again},
        "clearml": {
            "task_name": run,
            "reuse_last_task_id": False,
            "auto_connect_frameworks": False,  # else it takes TensorBoard's values a second time
            "auto_connect_arg_parser": False,
        },
        "comet_ml": {"experiment_key": identity, "mode": "get_or_create"},
        "dvclive": {"dir": str(folder / "dvclive"), "resume": again},
        "mlflow": {"run_name": run, "run_id": known},
        "swanlab": {
            "experiment_name": run,
            "logdir": where,
            "id": identity[:21],  # the only length that every version takes
            "resume": "allow",
        },
        "trackio": {"name": run, "resume": "allow" if again else "never"},
        "wandb": {"name": run, "dir": where, "id": identity, "resume": "allow"},
    }
    return options[name]


def _plain(config: Config) -> dict[str, Any]:
    """Every value by its dotted path; lists as JSON, which no tracker takes apart."""
    return {
        key: value if isinstance(value, str | int | float | None) else json.dumps(value)
        for key, value in flat(config).items()
    }
