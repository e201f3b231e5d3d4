"""Records of a run: metrics.jsonl, the trackers, and the steps on the terminal."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from seqkd.config.phases import PhaseConfig
from seqkd.config.run import Config
from seqkd.config.wording import describe_phase
from seqkd.console import Progress
from seqkd.files import atomic_write, disk_errors
from seqkd.storage.metrics_file import NAME, Row, read_rows
from seqkd.training.budget import Cost
from seqkd.training.clock import STAGES, Clock
from seqkd.training.trackers import Trackers

if TYPE_CHECKING:
    from seqkd.evaluation.heldout import Measurement


class Recorder:
    """Writer of a run's metrics. The caller closes it. Each row of metrics.jsonl is on disk before
    the next step begins."""

    def __init__(self, directory: Path, config: Config, out: TextIO | None = None) -> None:
        self.progress = Progress(out)
        self.config = config
        self.stage_seconds = dict.fromkeys((*STAGES, "other"), 0.0)
        self.path = directory / NAME
        self.file: TextIO | None = None
        self.trackers = Trackers(directory, config, self.note)

    def rewind(self, step: int) -> list[Row]:
        """Resume at ``step``: remove later rows, and an incompletely written one. Return the
        remaining rows."""
        self._close_file()
        with disk_errors(self.path):
            rows = read_rows(self.path)[0] if self.path.exists() else []
            rows = [row for row in rows if row["step"] < step]
            atomic_write(self.path, "".join(json.dumps(row) + "\n" for row in rows))
            self.file = self.path.open("a", encoding="utf-8")
        self.trackers.begin(step)
        return rows

    def note(self, text: str) -> None:
        """Print a line."""
        self.progress.note(text)

    def wait(self, text: str) -> None:
        """Print a line, and in a terminal the time until the next one."""
        self.progress.wait(text)

    def begin(self, name: str, phase: PhaseConfig) -> None:
        """Announce a phase."""
        self.progress.begin(describe_phase(self.config, name, phase))

    def step(self, step: int, row: dict[str, Any], costs: Cost, clock: Clock, steps: int) -> None:
        """Record one optimizer step. The run has about ``steps`` in all.

        ``row`` is from :func:`seqkd.training.step_metrics.step_metrics`, ``costs`` from
        :func:`seqkd.training.budget.cost`.
        """
        total = costs["seconds"]
        self.stage_seconds["other"] += total - sum(clock.seconds.values())
        for stage, seconds in clock.seconds.items():
            self.stage_seconds[stage] += seconds
        row = row | {f"time_{stage}_s": seconds for stage, seconds in clock.seconds.items()}
        row |= {name: count for name, count in costs.items() if name != "seconds"}
        if clock.ahead is not None:
            row["time_ahead_s"] = clock.ahead
        row |= {"time_step_s": total, "tokens_per_s": row["tokens"] / total}
        assert self.file is not None, "rewind first"
        with disk_errors(self.path):
            self.file.write(json.dumps({"step": step, **_finite(row)}, allow_nan=False) + "\n")
            self.file.flush()
            os.fsync(self.file.fileno())
        scalars = {key: value for key, value in row.items() if isinstance(value, (int, float))}
        self.trackers.log(step, scalars)
        self.progress.step(row["phase"], step + 1, steps, _figures(row), total)

    def held_out(self, step: int, measured: Measurement) -> None:
        """Send the held-out figures after ``step`` steps to the trackers."""
        figures = {f"heldout/{name}": interval.mean for name, interval in measured.table().items()}
        self.trackers.log(step, figures)

    def close(self) -> None:
        """Flush and close every file and tracker, and stop the display."""
        self.progress.close()
        self._close_file()
        self.trackers.close()

    def _close_file(self) -> None:
        if self.file is not None:
            with suppress(OSError):  # step() has already raised an error for a row on a full disk
                self.file.close()


def _figures(row: Mapping[str, Any]) -> str:
    """Return the figures of one step that are shown while the run is going."""
    labels = {
        "reverse_kl_per_token": "reverse KL/token",
        "forward_kl_per_token": "forward KL/token",
    }
    parts = [
        f"loss {row['loss']:<8.4g}",
        *(f"{label} {row[key]:<6.4g}" for key, label in labels.items() if key in row),
        f"length {row['length']:<5.3g}",
        f"{row['tokens_per_s']:.0f} tokens/s",
        f"{row['time_step_s']:.1f} s/step",
    ]
    return "  ".join(parts)


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """Replace infinity and NaN, which JSON cannot represent, by None."""
    not_finite = [k for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)]
    return {**row, **dict.fromkeys(not_finite)}
