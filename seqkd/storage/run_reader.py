"""A run directory as it stands, read for its page: whatever is missing or damaged is left out, and
said."""

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
from seqkd.evaluation.intervals import Interval
from seqkd.evaluation.summary import Evaluation, number, read_figures
from seqkd.files import atomic_write, disk_errors
from seqkd.storage import run_directory

Row = dict[str, Any]


@dataclass(frozen=True)
class Span:
    """One phase: the steps [begin, end)."""

    name: str
    begin: int
    end: int


@dataclass(frozen=True)
class Run:
    """Everything that the page of a run is made from."""

    directory: Path
    name: str
    config: Config | None
    config_text: str
    rows: list[Row]
    """Of metrics.jsonl, steps ascending, each once."""
    evaluation: Evaluation | None
    """Before, between and after the phases."""
    evaluated: dict[str, Evaluation]
    """By seqkd evaluate, on other prompts: by their name; figures by model in place of
    stage."""
    environment: dict[str, Any] | None
    problems: list[str]
    """A line for everything that could not be read."""
    held: bool | None
    """Whether a process is at work in the directory; None where locks do not tell."""
    written: datetime | None
    """When metrics.jsonl was last written to."""

    @property
    def done(self) -> int:
        """Optimizer steps taken."""
        return self.rows[-1]["step"] + 1 if self.rows else 0

    @property
    def spans(self) -> list[Span]:
        """The phases: as configured, or as far as the rows tell where a budget ends them."""
        if self.config is None or self.config.budget:
            named = groupby(self.rows, lambda row: str(row.get("phase", "")))
            steps = [(name, [row["step"] for row in rows]) for name, rows in named]
            return [Span(name, of[0], of[-1] + 1) for name, of in steps]
        ends: list[Span] = []
        for name, phase in self.config.phases:
            begin = ends[-1].end if ends else 0
            ends.append(Span(name, begin, begin + phase.steps))
        return ends

    @property
    def total(self) -> int | None:
        """Steps of all phases, where the configuration says so."""
        return self.spans[-1].end if self.config and not self.config.budget else None

    @property
    def figures(self) -> dict[str, tuple[int, dict[str, Interval]]]:
        """Held-out figures by stage, each with the steps that had been taken then. Without those
        of an earlier end of a run that now goes on beyond it."""
        taken = {"initial": 0} | {span.name: span.end for span in self.spans}
        found = self.evaluation.figures if self.evaluation else {}
        taken |= {stage: int(stage[5:]) for stage in found if re.fullmatch(r"step \d+", stage)}
        return {
            stage: (taken[stage], figures)
            for stage, figures in found.items()
            if taken.get(stage, math.inf) <= self.done
        }

    @property
    def over(self) -> bool:
        """Whether nothing more is to come: no process is at work, every step is taken and, where
        the configuration asks for it, the student after the last of them is measured."""
        if self.held or not self.rows:
            return False
        if self.config is None:
            return self.evaluation is not None
        measured = self.spans[-1].name in self.figures or not self.config.evaluation.prompts
        return self.trained and measured

    @property
    def trained(self) -> bool:
        """Whether every step is taken, as far as the configuration tells."""
        steps = sum(phase.steps for _, phase in self.config.phases) if self.config else None
        budget = self.config.budget if self.config else None
        spent = budget is not None and self.spent(budget.kind) >= budget.amount
        return spent or self.done == steps

    def costs(self, kind: BudgetKind) -> list[float]:
        """[N] of each row; see :class:`seqkd.config.lifecycle.BudgetConfig`."""
        key = "time_step_s" if kind == "seconds" else kind
        return [number(row, key) or 0.0 for row in self.rows]

    def spent(self, kind: BudgetKind) -> float:
        """By the steps so far."""
        return sum(self.costs(kind))

    @property
    def state(self) -> str:
        """In a few words."""
        if self.over:
            return "finished"
        if self.held is None:
            return "not finished"
        if not self.held:
            return "stopped" + (" before the last measurement" if self.trained else "")
        if not self.rows:
            return "starting"
        return "measuring on held-out prompts" if self.trained else "under way"

    @property
    def seconds(self) -> float:
        """Spent in optimizer steps."""
        return self.spent("seconds")


def read(directory: Path) -> Run:
    """What is in a run directory. DataError where it is none."""
    if not any((directory / name).is_file() for name in ("config.yaml", "metrics.jsonl")):
        raise DataError(
            f"{directory}: is not a run directory: it holds neither config.yaml nor metrics.jsonl. "
            "Name one that seqkd train has made, such as runs/quickstart."
        )
    problems: list[str] = []

    def attempt(name: str, action: Callable[[Path], Any]) -> Any:
        try:
            return action(directory / name)
        except SeqkdError as error:
            problems.append(str(error).replace(f"{directory}/", ""))
        except FileNotFoundError:
            problems.append(f"{name}: is not there.")
        except OSError as error:
            problems.append(f"{name}: cannot be read: {error.strerror}.")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            problems.append(f"{name}: is damaged and left out ({error!r:.200}).")
        return None

    held = run_directory.under_way(directory)  # before the files: what is over then stays over
    text = attempt("config.yaml", lambda file: file.read_text(encoding="utf-8", errors="replace"))
    config = attempt("config.yaml", load) if text is not None else None
    optional = {
        name: attempt(name, action) if (directory / name).exists() else None
        for name, action in (("evaluation.json", read_figures), ("environment.json", _environment))
    }
    files = sorted(directory.glob("evaluation/*/evaluation.json"))
    evaluated = {
        file.parent.name: found
        for file in files
        if (found := attempt(str(file.relative_to(directory)), read_figures)) is not None
    }
    rows, damaged = attempt("metrics.jsonl", _rows) or ([], 0)
    if damaged:
        problems.append(f"metrics.jsonl: {damaged} damaged rows are left out.")
    file = directory / "metrics.jsonl"
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


def _rows(file: Path) -> tuple[list[Row], int]:
    """The rows and the number of damaged ones. A last line without its end is still being
    written."""
    *lines, _ = file.read_text(encoding="utf-8", errors="replace").split("\n")
    rows: list[Row] = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        step = row.get("step") if isinstance(row, dict) else None
        if isinstance(step, int) and step > (rows[-1]["step"] if rows else -1):
            rows.append(row)
    return rows, len(lines) - len(rows)


def _environment(file: Path) -> dict[str, Any]:
    found = json.loads(file.read_text(encoding="utf-8"))
    return dict(found.items())


def write_evaluation(directory: Path, evaluation: dict[str, Any]) -> None:
    """``evaluation.json`` of the run directory. StorageError where it cannot be written."""
    file = directory / "evaluation.json"
    with disk_errors(file):
        atomic_write(file, json.dumps(evaluation, indent=2, ensure_ascii=False) + "\n")


def read_evaluation(directory: Path) -> dict[str, Any]:
    """What :func:`write_evaluation` wrote."""
    return dict(json.loads((directory / "evaluation.json").read_text(encoding="utf-8")))
