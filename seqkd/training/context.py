"""Objects that the training loop uses, and the phases of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from seqkd.checks.monitor import Monitor
from seqkd.config.phases import PhaseConfig
from seqkd.config.run import Config
from seqkd.evaluation.heldout import HeldOut, Measurement
from seqkd.training.checkpoint import Checkpoints, Progress
from seqkd.training.control import Control
from seqkd.training.positions import ReplayPositions
from seqkd.training.recorder import Recorder
from seqkd.types import Prompt
from seqkd.workers import Workers


@dataclass(frozen=True)
class TrainingContext:
    """Objects that the training loop uses. No field is replaced during a run."""

    config: Config
    workers: Workers
    train: Sequence[Prompt]
    corpus: Sequence[Prompt]
    evaluation: HeldOut | None
    recorder: Recorder
    positions: ReplayPositions
    checkpoints: Checkpoints
    monitor: Monitor
    control: Control
    publish: Callable[[Mapping[str, Measurement]], None]
    """Function that writes all measurements so far. It is called after each measurement."""
    export_to: str
    """Directory to which each phase exports the student."""

    def write_checkpoint(self, progress: Progress) -> bool:
        """Write a checkpoint. See :meth:`seqkd.training.checkpoint.Checkpoints.save`."""
        return self.checkpoints.save(progress, self.monitor.baseline)


@dataclass(frozen=True)
class PhaseSpan:
    """Phase with its position in the run."""

    name: str
    config: PhaseConfig
    first: int
    """Number of the phase's first optimizer step, counted from 0 over the whole run."""

    @property
    def end(self) -> int:
        """Number of the first optimizer step after the phase, unless a budget ends it earlier."""
        return self.first + self.config.steps


def phase_spans(config: Config) -> list[PhaseSpan]:
    """Return the phases of a run in order. Only the last one may end early."""
    spans: list[PhaseSpan] = []
    for name, phase in config.phases:
        spans.append(PhaseSpan(name, phase, spans[-1].end if spans else 0))
    return spans
