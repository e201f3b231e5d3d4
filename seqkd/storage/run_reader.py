"""Reader of run directories for reports; missing or damaged files are listed as problems."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

from seqkd.config.base import BudgetKind
from seqkd.config.run import Config, load
from seqkd.errors import DataError, SeqkdError
from seqkd.escaping import as_json
from seqkd.evaluation.intervals import Interval
from seqkd.evaluation.summary import Evaluation, number, read_figures
from seqkd.files import atomic_write, disk_errors
from seqkd.storage import metrics_file, run_directory
from seqkd.storage.metrics_file import Row


@dataclass(frozen=True)
class Span:
    """One phase: the steps [begin, end)."""

    name: str
    begin: int
    end: int


@dataclass(frozen=True)
class Run:
    """Content of a run directory that reports show."""

    directory: Path
    name: str
    config: Config | None
    config_text: str
    rows: list[Row]
    """Rows of metrics.jsonl, steps ascending."""
    evaluation: Evaluation | None
    """Held-out figures before, between and after the phases."""
    evaluated: dict[str, Evaluation]
    """Results of seqkd evaluate by the name of the prompts, with models in place of stages."""
    environment: dict[str, Any] | None
    problems: list[str]
    """One line for every file that could not be read."""
    held: bool | None
    """True if a process has locked the directory; None if its file system has no locks."""
    written: datetime | None
    """Time of the last write to metrics.jsonl."""

    @property
    def done(self) -> int:
        """Optimizer steps taken."""
        return self.rows[-1]["step"] + 1 if self.rows else 0

    @property
    def spans(self) -> list[Span]:
        """Phases as configured, or as recorded in metrics.jsonl if a budget ends them."""
        if self.config is None or self.config.budget:
            named = groupby(self.rows, lambda row: str(row.get("phase", "")))
            steps = [(name, [row["step"] for row in rows]) for name, rows in named]
            return [Span(name, taken[0], taken[-1] + 1) for name, taken in steps]
        ends: list[Span] = []
        for name, phase in self.config.phases:
            begin = ends[-1].end if ends else 0
            ends.append(Span(name, begin, begin + phase.steps))
        return ends

    @property
    def total(self) -> int | None:
        """Steps of all phases; None if a budget determines them."""
        return self.spans[-1].end if self.config and not self.config.budget else None

    @property
    def figures(self) -> dict[str, tuple[int, dict[str, Interval]]]:
        """Held-out figures by stage, with the number of steps before each stage. Stages after the
        recorded steps are omitted; an extended run has them from its earlier end."""
        taken = {"initial": 0} | {span.name: span.end for span in self.spans}
        figures = self.evaluation.figures if self.evaluation else {}
        taken |= {stage: int(stage[5:]) for stage in figures if re.fullmatch(r"step \d+", stage)}
        return {
            stage: (taken[stage], values)
            for stage, values in figures.items()
            if taken.get(stage, math.inf) <= self.done
        }

    @property
    def warnings(self) -> list[str]:
        """Warnings about the last measured student."""
        by_stage = self.evaluation.warnings if self.evaluation else {}
        return [by_stage[stage] for stage in [*self.figures][-1:] if stage in by_stage]

    @property
    def over(self) -> bool:
        """True if the run is finished: no process is running, every step is taken, and the final
        student is measured if the configuration requires it."""
        if self.held or not self.rows:
            return False
        if self.config is None:
            return self.evaluation is not None
        measured = self.spans[-1].name in self.figures or not self.config.evaluation.prompts
        return self.trained and measured

    @property
    def trained(self) -> bool:
        """True if every configured step is taken or the budget is spent."""
        steps = sum(phase.steps for _, phase in self.config.phases) if self.config else None
        budget = self.config.budget if self.config else None
        spent = budget is not None and self.spent(budget.kind) >= budget.amount
        return spent or self.done == steps

    def costs(self, kind: BudgetKind) -> list[float]:
        """Return [N] the cost of each row; see :class:`seqkd.config.lifecycle.BudgetConfig`."""
        key = "time_step_s" if kind == "seconds" else kind
        return [number(row, key) or 0.0 for row in self.rows]

    def spent(self, kind: BudgetKind) -> float:
        """Return the cost of all steps so far."""
        return sum(self.costs(kind))

    @property
    def state(self) -> str:
        """State of the run in a few words."""
        if self.over:
            return "finished"
        if self.held is None:
            return "not finished"
        if not self.held:
            return "stopped" + (" before the last measurement" if self.trained else "")
        if not self.rows:
            return "starting"
        return "measuring on held-out prompts" if self.trained else "running"

    @property
    def seconds(self) -> float:
        """Seconds spent in optimizer steps."""
        return self.spent("seconds")


def read(directory: Path) -> Run:
    """Read a run directory. Raises DataError if ``directory`` is not a run directory."""
    if not any((directory / name).is_file() for name in ("config.yaml", metrics_file.NAME)):
        raise DataError(
            f"{directory} is not a run directory: it contains neither config.yaml nor "
            "metrics.jsonl. Pass a directory written by seqkd train, such as runs/quickstart."
        )
    problems: list[str] = []

    def attempt(name: str, action: Callable[[Path], Any]) -> Any:
        try:
            return action(directory / name)
        except SeqkdError as error:
            problems.append(str(error).replace(f"{directory}/", ""))
        except FileNotFoundError:
            problems.append(f"{name}: no such file.")
        except OSError as error:
            problems.append(f"{name}: cannot be read: {error.strerror}.")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            problems.append(f"{name}: is damaged and omitted ({error!r:.200}).")
        return None

    held = run_directory.under_way(directory)  # before the files: a finished run stays finished
    text = attempt("config.yaml", lambda file: file.read_text(encoding="utf-8", errors="replace"))
    config = attempt("config.yaml", load) if text is not None else None
    optional = {
        name: attempt(name, action) if (directory / name).exists() else None
        for name, action in (("evaluation.json", read_figures), ("environment.json", _environment))
    }
    files = sorted(directory.glob("evaluation/*/evaluation.json"))
    evaluated = {
        file.parent.name: evaluation
        for file in files
        if (evaluation := attempt(str(file.relative_to(directory)), read_figures)) is not None
    }
    rows, damaged = attempt(metrics_file.NAME, metrics_file.read_rows) or ([], 0)
    if damaged:
        problems.append(f"metrics.jsonl: {damaged} damaged rows are omitted.")
    file = directory / metrics_file.NAME
    return Run(
        directory=directory,
        name=config.name if config else directory.resolve().name,
        config=config,
        config_text=text or "",
        rows=rows,
        evaluation=optional["evaluation.json"],
        evaluated=evaluated,
        environment=optional["environment.json"],
        problems=problems,
        held=held,
        written=datetime.fromtimestamp(file.stat().st_mtime, UTC) if rows else None,
    )


def _environment(file: Path) -> dict[str, Any]:
    values = json.loads(file.read_text(encoding="utf-8"))
    return dict(values.items())


def write_evaluation(directory: Path, evaluation: dict[str, Any]) -> None:
    """Write ``evaluation.json``. Raises StorageError if it cannot be written."""
    file = directory / "evaluation.json"
    with disk_errors(file):
        atomic_write(file, as_json(evaluation, indent=2) + "\n")


def read_evaluation(directory: Path) -> dict[str, Any]:
    """Read the content written by :func:`write_evaluation`."""
    return dict(json.loads((directory / "evaluation.json").read_text(encoding="utf-8")))
