"""What every step is watched for: faults that stop the run, and levels that it is warned of.

A fault is what no healthy run can show: counts that do not add up, log-probs of another
distribution than the one that is trained, scores that are zeros. Levels are a matter of degree,
and set in the configuration.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from seqkd.checks.probe import tolerance
from seqkd.config.alarms import AlarmConfig
from seqkd.config.run import Config
from seqkd.config.samplers import ON_STUDENT, STUDENT_ALONE
from seqkd.errors import LearningFault

Row = Mapping[str, Any]
"""A step's metrics, of :func:`seqkd.training.step_metrics.step_metrics`."""
WINDOW = 5
"""Steps at the start of a phase that later ones are compared with, and that a figure is the mean
of: single steps are noisy."""
EXACT = 1e-5
"""Relative. Scores of nothing give -ln V to float32's precision; a bad teacher's mean may well pass
within a thousandth of it."""


class Watched(NamedTuple):
    """A figure with levels."""

    name: str
    """In the configuration."""
    metric: str
    relative: bool
    """To its mean in the first steps of the phase."""
    says: str
    mend: str


WATCHED = (
    Watched(
        "truncation_rate",
        "truncation_rate",
        False,
        "is the share of completions that were cut",
        "The student hardly ever ends: see that its tokens of end are the teacher's, or raise "
        "rollout.max_tokens",
    ),
    Watched(
        "length_growth",
        "length",
        True,
        "times as long are completions as at the start of the phase",
        "A student that no longer ends has mostly lost its end of sequence: see the objective's "
        "normalization, and lower the learning rate",
    ),
    Watched(
        "repetition",
        "repetition",
        False,
        "is the share of 4-grams that repeat earlier ones of the same completion",
        "The student loops: lower the learning rate, or mix in the teacher's samples",
    ),
    Watched(
        "entropy_fraction",
        "entropy_per_token",
        True,
        "of its entropy a token at the start of the phase is left to the student",
        "It says the same whatever it is asked: lower the learning rate, or draw other prompts",
    ),
)


@dataclass
class History:
    """One figure in one phase."""

    first: list[float] = field(default_factory=list)
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def add(self, value: float) -> None:
        """Take in the figure of a step."""
        if len(self.first) < WINDOW:
            self.first.append(value)
        self.recent.append(value)

    def figure(self, relative: bool) -> float | None:
        """Mean of the last steps, over that of the first; None where it is not known yet."""
        mean, start = sum(self.recent) / WINDOW, sum(self.first) / WINDOW
        if len(self.recent) < WINDOW or (relative and not start > 0):
            return None
        return mean / start if relative else mean


class StepAlarms:
    """Looks at the metrics of every step, of a run over ``vocabulary`` tokens."""

    def __init__(self, config: Config, vocabulary: int) -> None:
        self.config, self.alarms, self.uniform = config, config.alarms, -math.log(vocabulary)
        self.begin()

    def begin(self) -> None:
        """Forget every step."""
        self.skipped = 0
        self._begin(None)

    def _begin(self, phase: str | None) -> None:
        self.phase = phase
        self.histories: dict[str, History] = {}
        self.said: set[str] = set()

    def replay(self, rows: Iterable[Row]) -> None:
        """Take in earlier steps, of which nothing is said any more; for a run that goes on."""
        for row in rows:
            if row["phase"] != self.phase:
                self._begin(row["phase"])
            self.skipped = self.skipped + 1 if row.get("skipped") else 0
            if self.skipped:
                continue
            for prefix in _students(row):
                for watched in WATCHED:
                    key = prefix + watched.metric
                    value = row.get(key)  # null in a file stands for what was no number
                    if value is not None and math.isfinite(value):
                        self.histories.setdefault(key, History()).add(value)

    def check(self, row: Row) -> list[str]:
        """Warnings, each once a phase; LearningFault where the run must not go on. A step that
        was skipped because it was not finite says so in its row ("skipped")."""
        self.replay([row])
        self._check_finite(row)
        if self.skipped:
            return []
        for prefix in _prefixes(row):
            self._check_gap(row, prefix)
            self._check_scores(row, prefix)
        return [w for prefix in _prefixes(row) for w in self._check_levels(prefix)]

    def _check_finite(self, row: Row) -> None:
        if self.skipped >= self.alarms.non_finite_steps:
            raise LearningFault(
                f"alarms.non_finite_steps: the loss or its gradient was not a finite number in "
                f"{self.skipped} steps in a row. Every step is skipped and nothing learnt. Lower "
                "learner.lr or learner.max_grad_norm, and see whether the teacher's log-probs in "
                "metrics.jsonl are finite."
            )
        if not self.skipped and not all(map(math.isfinite, (row["loss"], row["grad_norm"]))):
            raise LearningFault(
                f"loss {row['loss']:g}, grad_norm {row['grad_norm']:g}: a step was taken on what "
                "is not a finite number, and the weights with it are lost. Go on from the last "
                "checkpoint with a lower learner.lr."
            )

    def _check_gap(self, row: Row, prefix: str) -> None:
        gap = row.get(f"{prefix}logprob_gap_mean")
        sampler = prefix[:-1] or row["sampler"]
        most = self.alarms.logprob_gap or _gap_tolerance(self.config, sampler)
        if gap is None or gap <= most:
            return
        raise LearningFault(
            f"{prefix}logprob_gap_mean: what drew the completions (sampler {sampler}) gave their "
            f"tokens other log-probs than the same model where it is trained or scores, by "
            f"{gap:.3g} nats a token (at most {most:g}). It has other weights or cached states of "
            "older ones, or draws at another temperature or top_p, or its log-probs stand beside "
            "the wrong tokens. Go on from the last checkpoint, with precisions of float32 to tell "
            "rounding from a fault; raise alarms.logprob_gap if it is rounding."
        )

    def _check_scores(self, row: Row, prefix: str) -> None:
        mean = row.get(f"{prefix}teacher_logprob_per_token")
        if mean is None:
            return
        nothing = math.isclose(mean, self.uniform, rel_tol=EXACT)
        if not math.isfinite(mean):
            fault = "are no finite numbers"
        elif mean == 0 or nothing:
            fault = "are zeros" + (" (hidden states of zero give -ln V)" if nothing else "")
        else:
            return
        raise LearningFault(
            f"{prefix}teacher_logprob_per_token {mean:.6g}: the teacher's scores {fault}. They "
            "were lost on the way, or the teacher's weights were. Look into its log with "
            "--verbose, and go on from the last checkpoint."
        )

    def _check_levels(self, prefix: str) -> list[str]:
        warnings = []
        for watched in WATCHED:
            level: AlarmConfig = getattr(self.alarms, watched.name)
            key = prefix + watched.metric
            value = self.histories.get(key, History()).figure(watched.relative)
            if value is None:
                continue
            text = f"{value:.3g} {watched.says}, over the last {WINDOW} steps ({self.phase})."
            if level.reached(level.stop, value):
                raise LearningFault(
                    f"alarms.{watched.name}.stop {level.stop:g}: {text} {watched.mend}, and go on "
                    "from a checkpoint before it."
                )
            if level.reached(level.warn, value) and key not in self.said:
                self.said.add(key)
                warnings.append(
                    f"alarms.{watched.name}.warn {level.warn:g}: {text} {watched.mend}."
                )
        return warnings


def _students(row: Row) -> list[str]:
    """Before the names of what the student wrote: other texts are no sign of its health."""
    return [p for p in _prefixes(row) if (p[:-1] or row["sampler"]) in ON_STUDENT]


def _prefixes(row: Row) -> list[str]:
    """Before the names of what each sampler wrote; none before the phase's own."""
    return list(dict.fromkeys(key[: key.rfind("/") + 1] for key in row))


def _gap_tolerance(config: Config, sampler: str) -> float:
    """Nats a token by which what draws may differ from what trains or scores."""
    precisions: list[str] = []
    if sampler in ON_STUDENT:
        precisions += [config.rollout.precision, config.learner.precision]
    if sampler not in STUDENT_ALONE:
        for teacher in config.teachers.values():
            precisions.append(teacher.precision)
            if teacher.writing_precision:
                precisions.append(teacher.writing_precision)
    return tolerance(*precisions)
