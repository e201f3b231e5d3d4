"""Positions in the teacher caches and the replay log, as stored in checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from seqkd.teachers.cache import CachedSampler
from seqkd.training.replay_log import ReplayLog

Position = dict[str, Any]
"""Plain data: completions taken from each cache ("taken"), files of the replay log ("log")."""


class ReplayPositions:
    """Access to the positions of the caches and of the replay log."""

    def __init__(self, samplers: Mapping[str, CachedSampler], log: ReplayLog) -> None:
        """Create the access. ``samplers`` are the samplers that training reads, by teacher name."""
        self.samplers, self.log = samplers, log

    def current(self) -> Position:
        """Return the current positions."""
        taken = {name: sampler.position() for name, sampler in self.samplers.items()}
        return {"taken": taken, "log": self.log.position()}

    def restore(self, position: Position) -> None:
        """Go back to ``position``, or to the start of the run if it is empty."""
        for name, sampler in self.samplers.items():
            sampler.restore(position.get("taken", {}).get(name, {}))
        self.log.resume(position.get("log", {}))

    def forget_before(self, position: Position) -> None:
        """Remove entries of the replay log from before ``position``."""
        self.log.prune(position.get("log", {}))
