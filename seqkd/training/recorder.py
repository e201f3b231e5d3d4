"""What a run tells: metrics.jsonl, its trackers, and one line a step for the person watching."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from seqkd.config.phases import PhaseConfig
from seqkd.config.run import Config
from seqkd.config.wording import describe_phase
from seqkd.files import atomic_write, disk_errors
from seqkd.storage.metrics_file import NAME, Row, read_rows
from seqkd.training.budget import Cost
from seqkd.training.clock import STAGES, Clock
from seqkd.training.trackers import Trackers

if TYPE_CHECKING:
    from seqkd.evaluation.heldout import Measurement


class Recorder:
    """Writes a run's metrics as they come; closed by the caller. Each row of metrics.jsonl is on
    disk before the next step begins."""

    def __init__(self, directory: Path, config: Config, out: TextIO | None = None) -> None:
        self.out = out or sys.stdout
        self.live = self.out.isatty()
        self.config = config
        self.stage_seconds = dict.fromkeys((*STAGES, "other"), 0.0)
        self.path = directory / NAME
        self.file: TextIO | None = None
        self.trackers = Trackers(directory, config, self.note)

    def rewind(self, step: int) -> list[Row]:
        """Go on with ``step``: later rows, and one that was not written to its end, are cut off.
        Returns the rows that are left."""
        self._close_file()
        with disk_errors(self.path):
            rows = read_rows(self.path)[0] if self.path.exists() else []
            rows = [row for row in rows if row["step"] < step]
            atomic_write(self.path, "".join(json.dumps(row) + "\n" for row in rows))
            self.file = self.path.open("a", encoding="utf-8")
        self.trackers.begin(step)
        return rows

    def note(self, text: str) -> None:
        """A line for the person watching."""
        self._line(text, keep=True)

    def begin(self, name: str, phase: PhaseConfig) -> None:
        """Announce a phase."""
        self.recent: list[float] = []
        self.note(describe_phase(self.config, name, phase))

    def step(self, step: int, row: dict[str, Any], costs: Cost, clock: Clock, steps: int) -> None:
        """Record one optimizer step of about ``steps``.

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
        self.recent = [*self.recent[-9:], total]
        self._line(self._progress(row, step + 1, steps), keep=step + 1 == steps)

    def held_out(self, step: int, measured: Measurement) -> None:
        """Show what was measured on held-out prompts after ``step`` steps."""
        figures = {f"heldout/{name}": interval.mean for name, interval in measured.table().items()}
        self.trackers.log(step, figures)

    def close(self) -> None:
        """Flush and close every file and tracker."""
        self._close_file()
        self.trackers.close()

    def _close_file(self) -> None:
        if self.file is not None:
            with suppress(OSError):  # a row that could not be written was said when it was
                self.file.close()

    def _progress(self, row: dict[str, Any], done: int, steps: int) -> str:
        filled = round(16 * done / steps)
        left = (steps - done) * sum(self.recent) / len(self.recent)
        parts = [
            f"{row['phase']:<6} {done:>3}/{steps} [{'#' * filled}{'.' * (16 - filled)}]",
            f"loss {row['loss']:<8.4g}",
            *(
                f"{label} {row[key]:<6.4g}"
                for key, label in (
                    ("reverse_kl_per_token", "reverse KL/token"),
                    ("forward_kl_per_token", "forward KL/token"),
                )
                if key in row
            ),
            f"length {row['length']:<5.3g}",
            f"{row['tokens_per_s']:.0f} tokens/s",
            f"{row['time_step_s']:.1f} s/step",
            f"ETA {int(left // 60)}:{int(left % 60):02d}",
        ]
        return "  ".join(parts)

    def _line(self, text: str, keep: bool) -> None:
        if self.live:
            self.out.write("\r\033[K" + text + ("\n" if keep else ""))
        else:
            self.out.write(text + "\n")
        self.out.flush()


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """With null in place of what JSON has no number for."""
    lost = [k for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)]
    return {**row, **dict.fromkeys(lost)}
