"""Saving a run and going on from there: everything that its next step depends on."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from seqkd.config.run import Config
from seqkd.errors import CheckpointError
from seqkd.evaluation.heldout import Example, Measurement
from seqkd.learner.running_costs import RunningCosts
from seqkd.protocols import Learner, Sampler
from seqkd.storage import checkpoint_dir
from seqkd.teachers.cache import CachedSampler
from seqkd.training.budget import Spent
from seqkd.training.control import Control
from seqkd.training.replay_log import ReplayLog
from seqkd.types import rollout_from

Running = dict[str, RunningCosts]
Place = dict[str, Any]
"""What was taken of each teacher's journal, and the positions of the run's own."""


@dataclass
class Progress:
    """Where a run stands between two optimizer steps; with the learner's files, all of its state.
    Random numbers and the position in the data follow from ``step``."""

    step: int = 0
    """Optimizer steps taken."""
    between_draws: bool = True
    """Whether the next step begins with a draw of prompts: only there a run is saved."""
    running: Running = field(default_factory=dict)
    """Of the phase under way, by sampler."""
    measured: dict[str, Measurement] = field(default_factory=dict)
    spent: Spent = field(default_factory=dict)
    known_text: dict[str, list[float]] = field(default_factory=dict)
    """What each teacher first said of it; see :mod:`seqkd.checks.canary`."""


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(
        self,
        directory: Path,
        config: Config,
        learner: Learner,
        samplers: Mapping[str, Sampler],
        journal: ReplayLog,
        control: Control,
    ) -> None:
        """``samplers`` are the teachers', as they stand before the first step."""
        self.directory, self.config, self.learner = directory, config.checkpoints, learner
        self.samplers = {n: s for n, s in samplers.items() if isinstance(s, CachedSampler)}
        self.taken = self._taken()
        self.journal, self.control = journal, control
        self.last_step, self.last_time = 0, time.monotonic()
        self.unlearnt: list[Place] = []
        """Where each draw began that is not learnt from yet, in order."""

    def place(self) -> Place:
        """Where the journals stand."""
        return {"taken": self._taken(), "journal": self.journal.position()}

    def restore(self) -> tuple[Progress, list[str]]:
        """Put the learner at the newest whole checkpoint, or leave it at the initial student where
        none was written; and what was skipped on the way, a line each. CheckpointError where none
        of them is whole."""
        path, state, skipped = checkpoint_dir.newest(self.directory)
        damaged = [line for line in skipped if not line.endswith(checkpoint_dir.UNFINISHED)]
        if path is None and damaged:
            raise CheckpointError(
                "\n".join(damaged)
                + f"\n{self.directory}: no checkpoint is whole. Restore one from a copy, or choose "
                "a new name=…."
            )
        self.last_step = 0
        self.unlearnt.clear()
        self.journal.resume(state.get("journal", {}))
        if path is None:
            self._take(self.taken)
            return Progress(), skipped
        self.learner.restore(str(path), state["policy_version"])
        self._take(state["taken"])
        self.last_step, self.last_time = state["step"], time.monotonic()
        return Progress(
            state["step"],
            running={name: _running(row) for name, row in state["running"].items()},
            measured={name: _measurement(row) for name, row in state["measured"].items()},
            spent=state["spent"],
            known_text=state["known_text"],
        ), skipped

    def due(self, progress: Progress) -> bool:
        """Whether enough steps or time have passed since the last one."""
        steps = progress.step - self.last_step
        minutes = (time.monotonic() - self.last_time) / 60
        return steps >= self.config.every_steps or (
            steps > 0 and minutes >= self.config.every_minutes
        )

    def save(self, progress: Progress) -> bool:
        """Write one, unless it is there already or this is no place for it; whether the last
        checkpoint has all of ``progress``."""
        if progress.step == self.last_step:
            return True
        # A step that was taken and could not be recorded is no place either.
        taken = self.learner.policy_version == progress.step
        if not (progress.between_draws and self.learner.whole and taken):
            return False
        state = {
            "step": progress.step,
            "policy_version": self.learner.policy_version,
            "running": {name: _running_row(r) for name, r in progress.running.items()},
            "measured": {name: _measurement_row(m) for name, m in progress.measured.items()},
            "spent": progress.spent,
            "known_text": progress.known_text,
            **(self.unlearnt[0] if self.unlearnt else self.place()),
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
        self.journal.prune(oldest.get("journal", {}))
        self.control.saved()
        return True

    def _taken(self) -> dict[str, dict[str, int]]:
        return {name: dict(sampler.taken) for name, sampler in self.samplers.items()}

    def _take(self, taken: Mapping[str, Mapping[str, int]]) -> None:
        for name, sampler in self.samplers.items():
            sampler.taken.clear()
            sampler.taken.update(taken.get(name, {}))


def _running_row(running: RunningCosts) -> dict[str, Any]:
    costs, alive = (None if t is None else t.tolist() for t in (running.costs, running.alive))
    return {"costs": costs, "alive": alive}


def _running(row: dict[str, Any]) -> RunningCosts:
    running = RunningCosts()
    if row["costs"] is not None:
        running.costs, running.alive = torch.tensor(row["costs"]), torch.tensor(row["alive"])
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
