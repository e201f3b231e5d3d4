"""Alarms on the metrics of every step: faults stop the run, levels warn or stop it.

A fault never occurs in a healthy run. Examples are counts that do not add up, log-probs of a
distribution other than the trained one, and scores that are zeros. Levels are thresholds from the
configuration.
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
"""Metrics of one step, from :func:`seqkd.training.step_metrics.step_metrics`."""
WINDOW = 5
"""Number of steps that a figure is averaged over, because single steps are noisy. Relative figures
are divided by the mean over the first steps of the phase, as many as this."""
EXACT = 1e-5
"""Relative tolerance for -ln V. Hidden states of zeros give -ln V to float32 precision, but the
mean of a bad teacher may well come within a thousandth of it."""


class Watched(NamedTuple):
    """Figure with configurable levels."""

    name: str
    """Name in the configuration."""
    metric: str
    relative: bool
    """True if the figure is relative to its mean over the first steps of the phase."""
    description: str
    fix: str


WATCHED = (
    Watched(
        "truncation_rate",
        "truncation_rate",
        False,
        "the share of completions truncated at rollout.max_tokens",
        "The student rarely ends its completions. Check that its end-of-sequence tokens are the "
        "teacher's, or raise rollout.max_tokens",
    ),
    Watched(
        "length_growth",
        "length",
        True,
        "the mean completion length relative to the start of the phase",
        "The student has probably lost its end-of-sequence token. Check the objective's "
        "normalization, and lower the learning rate",
    ),
    Watched(
        "repetition",
        "repetition",
        False,
        "the share of 4-grams that repeat an earlier 4-gram of the same completion",
        "The student repeats itself. Lower the learning rate, or mix in teacher samples",
    ),
    Watched(
        "entropy_fraction",
        "entropy_per_token",
        True,
        "the student's entropy per token relative to the start of the phase",
        "The student's completions hardly vary. Lower the learning rate, or use other prompts",
    ),
)


@dataclass
class History:
    """Values of one figure in one phase."""

    first: list[float] = field(default_factory=list)
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def add(self, value: float) -> None:
        """Add the value of a step."""
        if len(self.first) < WINDOW:
            self.first.append(value)
        self.recent.append(value)

    def figure(self, relative: bool) -> float | None:
        """Return the mean of the last :data:`WINDOW` steps, or None before there are as many. If
        ``relative``, the mean is divided by that of the first steps, and None is returned if that
        is not positive."""
        mean, start = sum(self.recent) / WINDOW, sum(self.first) / WINDOW
        if len(self.recent) < WINDOW or (relative and not start > 0):
            return None
        return mean / start if relative else mean


class StepAlarms:
    """Alarms on the metrics of every step of a run with a vocabulary of ``vocabulary`` tokens."""

    def __init__(self, config: Config, vocabulary: int) -> None:
        self.config, self.alarms, self.uniform = config, config.alarms, -math.log(vocabulary)
        self.begin()

    def begin(self) -> None:
        """Forget all steps."""
        self.skipped = 0
        self._begin(None)

    def _begin(self, phase: str | None) -> None:
        self.phase = phase
        self.histories: dict[str, History] = {}
        self.warned: set[str] = set()

    def replay(self, rows: Iterable[Row]) -> None:
        """Add the steps before a resumed one, without warnings."""
        for row in rows:
            if row["phase"] != self.phase:
                self._begin(row["phase"])
            self.skipped = self.skipped + 1 if row.get("skipped") else 0
            if self.skipped:
                continue
            for prefix in _students(row):
                for watched in WATCHED:
                    key = prefix + watched.metric
                    value = row.get(key)  # metrics.jsonl stores non-finite values as null
                    if value is not None and math.isfinite(value):
                        self.histories.setdefault(key, History()).add(value)

    def check(self, row: Row) -> list[str]:
        """Return warnings, each once per phase. Raises LearningFault if the run must stop. The
        row of a step that was skipped as non-finite has "skipped" set."""
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
                f"alarms.non_finite_steps: the loss or its gradient was not finite in "
                f"{self.skipped} steps in a row. These steps were skipped. Lower learner.lr or "
                "learner.max_grad_norm, and check that the teacher's log-probs in metrics.jsonl "
                "are finite."
            )
        if not self.skipped and not all(map(math.isfinite, (row["loss"], row["grad_norm"]))):
            raise LearningFault(
                f"loss {row['loss']:g}, grad_norm {row['grad_norm']:g}: the optimizer took a step "
                "with a non-finite loss or gradient, so the weights are corrupt. Resume from the "
                "last checkpoint with a lower learner.lr."
            )

    def _check_gap(self, row: Row, prefix: str) -> None:
        gap = row.get(f"{prefix}logprob_gap_mean")
        sampler = prefix[:-1] or row["sampler"]
        most = self.alarms.logprob_gap or _gap_tolerance(self.config, sampler)
        if gap is None or gap <= most:
            return
        raise LearningFault(
            f"{prefix}logprob_gap_mean: the engine that sampled the completions (sampler {sampler})"
            f" and the same model in the learner or scorer differ by {gap:.3g} nats per token "
            f"(limit {most:g}). Possible causes: different weights, a stale prefix cache, another "
            "temperature or top_p, or log-probs assigned to the wrong tokens. Resume from the last "
            "checkpoint with all precisions set to float32. If the gap vanishes, it was rounding: "
            "raise alarms.logprob_gap."
        )

    def _check_scores(self, row: Row, prefix: str) -> None:
        mean = row.get(f"{prefix}teacher_logprob_per_token")
        if mean is None:
            return
        nothing = math.isclose(mean, self.uniform, rel_tol=EXACT)
        if not math.isfinite(mean):
            fault = "are not finite"
        elif mean == 0 or nothing:
            fault = "are zeros" + (" (hidden states of zeros give -ln V)" if nothing else "")
        else:
            return
        raise LearningFault(
            f"{prefix}teacher_logprob_per_token {mean:.6g}: the teacher's scores {fault}. Either "
            "the scores were lost in transit, or the teacher lost its weights. Resume from the "
            "last checkpoint, with --verbose to see the teacher's log."
        )

    def _check_levels(self, prefix: str) -> list[str]:
        warnings = []
        for watched in WATCHED:
            level: AlarmConfig = getattr(self.alarms, watched.name)
            key = prefix + watched.metric
            value = self.histories.get(key, History()).figure(watched.relative)
            if value is None:
                continue
            text = (
                f"{watched.description} is {value:.3g} over the last {WINDOW} steps "
                f"(phase {self.phase})."
            )
            if level.reached(level.stop, value):
                raise LearningFault(
                    f"alarms.{watched.name}.stop {level.stop:g}: {text} {watched.fix}. Then resume "
                    "from an earlier checkpoint."
                )
            if level.reached(level.warn, value) and key not in self.warned:
                self.warned.add(key)
                warnings.append(f"alarms.{watched.name}.warn {level.warn:g}: {text} {watched.fix}.")
        return warnings


def _students(row: Row) -> list[str]:
    """Return the metric prefixes of samplers in which the student writes. Texts that the student
    did not write say nothing about its health."""
    return [p for p in _prefixes(row) if (p[:-1] or row["sampler"]) in ON_STUDENT]


def _prefixes(row: Row) -> list[str]:
    """Return the metric prefix of each sampler. It is empty for the phase's own sampler."""
    return list(dict.fromkeys(key[: key.rfind("/") + 1] for key in row))


def _gap_tolerance(config: Config, sampler: str) -> float:
    """Return the largest allowed mean difference, in nats per token, between the engine that
    samples and the model that trains or scores."""
    precisions: list[str] = []
    if sampler in ON_STUDENT:
        precisions += [config.rollout.precision, config.learner.precision]
    if sampler not in STUDENT_ALONE:
        for teacher in config.teachers.values():
            precisions.append(teacher.precision)
            if teacher.writing_precision:
                precisions.append(teacher.writing_precision)
    return tolerance(*precisions)
