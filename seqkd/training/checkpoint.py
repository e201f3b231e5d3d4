"""Checkpoints: the state of a run that its next step depends on."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from seqkd.config.lifecycle import CheckpointsConfig
from seqkd.errors import CheckpointError
from seqkd.evaluation.heldout import Example, Measurement
from seqkd.learner.running_costs import RunningCosts
from seqkd.protocols import Learner
from seqkd.storage import checkpoint_dir
from seqkd.training.budget import Spent
from seqkd.training.control import Control
from seqkd.training.positions import Position, ReplayPositions
from seqkd.types import rollout_from

KEYS = {
    "run", "step", "policy_version", "running", "measured", "spent", "baseline", "position"
}  # fmt: skip
"""Keys of the state of a checkpoint."""


@dataclass
class FeedState:
    """State of :class:`seqkd.training.feed.RolloutFeed`, its only writer."""

    running: dict[str, RunningCosts] = field(default_factory=dict)
    """Running costs of the current phase, by sampler."""
    spent: Spent = field(default_factory=dict)
    pending: list[Position] = field(default_factory=list)
    """Start positions of the draws that training has not finished with yet, oldest first."""
    mid_draw: bool = False
    """True if some, but not all, of the steps that train on a draw are taken. No checkpoint is
    written then."""


@dataclass
class Progress:
    """State of a run between two optimizer steps. Together with the learner's files it is the full
    state: random numbers and the position in the data follow from ``step``."""

    step: int = 0
    """Optimizer steps taken. Advanced by the loop."""
    measured: dict[str, Measurement] = field(default_factory=dict)
    """Held-out measurements by stage. Added by the loop."""
    feed: FeedState = field(default_factory=FeedState)


class Restored(NamedTuple):
    """Result of :meth:`Checkpoints.restore`."""

    progress: Progress
    baseline: dict[str, list[float]]
    """See :attr:`seqkd.checks.monitor.Monitor.baseline`."""
    skipped: list[str]
    """One line per newer checkpoint that is incomplete or damaged."""


class Checkpoints:
    """Checkpoints of one run, the one with the id ``run``."""

    def __init__(
        self,
        directory: Path,
        run: str,
        config: CheckpointsConfig,
        learner: Learner,
        positions: ReplayPositions,
        control: Control,
    ) -> None:
        self.directory, self.run = directory, run
        self.config, self.learner = config, learner
        self.positions, self.control = positions, control
        self.last_step, self.last_time = 0, time.monotonic()

    def restore(self) -> Restored:
        """Restore the learner, the caches and the replay log from the newest valid checkpoint, or
        reset them to the start of the run if there is no checkpoint. Raises CheckpointError if
        there are checkpoints but none is valid."""
        path, state, skipped = checkpoint_dir.newest(self.directory, self._check)
        damaged = [line for line in skipped if not line.endswith(checkpoint_dir.UNFINISHED)]
        if path is None and damaged:
            raise CheckpointError(
                "\n".join(damaged)
                + f"\n{self.directory}: no checkpoint is intact. Restore one from a copy, or "
                "choose a new name=…."
            )
        self.positions.restore(state.get("position", {}))
        if path is None:
            self.last_step = 0
            return Restored(Progress(), {}, skipped)
        self.learner.restore(str(path), state["policy_version"])
        self.last_step, self.last_time = state["step"], time.monotonic()
        running = {name: _running(row) for name, row in state["running"].items()}
        measured = {name: _measurement(row) for name, row in state["measured"].items()}
        progress = Progress(state["step"], measured, FeedState(running, state["spent"]))
        return Restored(progress, state["baseline"], skipped)

    def _check(self, path: Path, state: dict[str, Any]) -> None:
        if missing := sorted(KEYS - state.keys()):
            raise CheckpointError(f"{path}: {checkpoint_dir.STATE} is damaged: no {missing[0]!r}.")
        if state["run"] != self.run:
            raise CheckpointError(f"{path}: belongs to another run. Remove it.")

    def due(self, progress: Progress) -> bool:
        """Return True if enough steps or time have passed since the last checkpoint."""
        steps = progress.step - self.last_step
        minutes = (time.monotonic() - self.last_time) / 60
        return steps >= self.config.every_steps or (
            steps > 0 and minutes >= self.config.every_minutes
        )

    def save(self, progress: Progress, baseline: Mapping[str, list[float]]) -> bool:
        """Write a checkpoint, unless this step already has one or the state is inconsistent.
        Returns True if the last checkpoint contains all of ``progress``."""
        if progress.step == self.last_step:
            return True
        # The learner may have taken a step that could not be recorded.
        recorded = self.learner.policy_version == progress.step
        feed = progress.feed
        if feed.mid_draw or not self.learner.is_consistent or not recorded:
            return False
        state = {
            "run": self.run,
            "step": progress.step,
            "policy_version": self.learner.policy_version,
            "running": {name: _running_row(r) for name, r in feed.running.items()},
            "measured": {name: _measurement_row(m) for name, m in progress.measured.items()},
            "spent": feed.spent,
            "baseline": baseline,
            "position": feed.pending[0] if feed.pending else self.positions.current(),
        }
        checkpoint_dir.save(
            self.directory,
            progress.step,
            lambda folder: self.learner.save(str(folder)),
            state,
            self.config.keep_last,
        )
        self.last_step, self.last_time = progress.step, time.monotonic()
        oldest = checkpoint_dir.oldest_state(self.directory)
        self.positions.forget_before(oldest.get("position", {}))
        self.control.saved()
        return True


def _running_row(running: RunningCosts) -> dict[str, Any]:
    costs, survival = (None if t is None else t.tolist() for t in (running.costs, running.survival))
    return {"costs": costs, "survival": survival}


def _running(row: dict[str, Any]) -> RunningCosts:
    running = RunningCosts()
    if row["costs"] is not None:
        running.costs, running.survival = torch.tensor(row["costs"]), torch.tensor(row["survival"])
    return running


def _measurement_row(measurement: Measurement) -> dict[str, Any]:
    return {
        "sums": {name: values.tolist() for name, values in measurement.sums.items()},
        "student": [asdict(shown) for shown in measurement.student],
        "teacher": [asdict(shown) for shown in measurement.teacher],
    }


def _shown(row: dict[str, Any]) -> Example:
    return Example(rollout_from(row["rollout"]), tuple(row["costs"]))


def _measurement(row: dict[str, Any]) -> Measurement:
    return Measurement(
        {name: np.array(values) for name, values in row["sums"].items()},
        tuple(map(_shown, row["student"])),
        tuple(map(_shown, row["teacher"])),
    )
