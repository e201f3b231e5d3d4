"""Positions in the teacher caches and the replay log, which a checkpoint stores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from seqkd.teachers.cache import CachedSampler
from seqkd.training.replay_log import ReplayLog

Position = dict[str, Any]
"""Plain data: completions taken of each cache ("taken"), files of the replay log ("log")."""


class ReplayPositions:
    """Reads and restores the positions of the caches and of the replay log."""

    def __init__(self, samplers: Mapping[str, CachedSampler], log: ReplayLog) -> None:
        """``samplers`` are those that training reads, by the teacher's name."""
        self.samplers, self.log = samplers, log

    def current(self) -> Position:
        """Return the positions as they are now."""
        taken = {name: sampler.position() for name, sampler in self.samplers.items()}
        return {"taken": taken, "log": self.log.position()}

    def restore(self, position: Position) -> None:
        """Return to ``position``; to the start of a run if it is empty."""
        for name, sampler in self.samplers.items():
            sampler.restore(position.get("taken", {}).get(name, {}))
        self.log.resume(position.get("log", {}))

    def forget_before(self, position: Position) -> None:
        """Remove what the replay log holds from before ``position``."""
        self.log.prune(position.get("log", {}))
