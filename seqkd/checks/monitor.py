"""Checks in every step of a run: see docs/health_checks.md."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from seqkd.checks.alarms import StepAlarms
from seqkd.checks.canary import Canary, ProbeResponses, must_move
from seqkd.checks.invariants import check_counts, check_trained
from seqkd.files import atomic_directory
from seqkd.protocols import Part
from seqkd.teachers.cache import TeacherCache
from seqkd.types import StepResult


class Monitor:
    """The probe and the alarms of one run."""

    def __init__(
        self,
        canary: Canary,
        steps: StepAlarms,
        interval: int,
        say: Callable[[str], None],
        directory: Path,
        caches: Sequence[TeacherCache],
    ) -> None:
        """Create the monitor.

        ``interval`` is the number of steps between two probes; 0 turns the probe off. Batches of
        skipped steps are written to ``directory``. ``caches`` are the caches that the teachers
        write to and that other runs may read.
        """
        self.canary, self.steps, self.interval = canary, steps, interval
        self.say, self.directory, self.caches = say, directory, caches
        self.moved, self.checked = False, -interval

    @property
    def baseline(self) -> dict[str, list[float]]:
        """Each teacher's first log-probs of the probe, by name. A checkpoint stores them."""
        return self.canary.first

    def rewind(
        self, rows: Iterable[Mapping[str, Any]], baseline: Mapping[str, list[float]]
    ) -> None:
        """Continue after the steps of ``rows`` with another learner than before, and with the
        :attr:`baseline` of the checkpoint."""
        self.steps.begin()
        self.steps.replay(rows)
        self.canary.begin(baseline)
        self.moved, self.checked = False, -self.interval

    def before_prefetch(self, step: int) -> None:
        """Prepare for the draw for ``step``, which will run in parallel with earlier steps."""
        if self._due(step):
            self.canary.hold()

    def probe(self, step: int, version: int) -> ProbeResponses | None:
        """Have engines and teachers score the probe at the end of the draw for ``step``, if it is
        due. The engines should have loaded ``version`` of the learner's weights."""
        return self.canary.ask(version) if self._due(step) else None

    def after_sampling(self, step: int, probe: ProbeResponses | None) -> None:
        """Check the probe of a draw before ``step`` trains on the draw. A passed check confirms
        the teachers' output so far, which is then committed to their caches."""
        if probe is not None:
            self.canary.check(probe, self.moved)
            self.moved, self.checked = False, step
            for cache in self.caches:
                cache.commit()

    def rollback(self) -> None:
        """Remove, after a fault, the entries that teachers wrote to caches since the last
        commit."""
        for cache in self.caches:
            cache.rollback()

    def before_checkpoint(self) -> None:
        """Raise LearningFault if the learner is broken."""
        self.canary.check_learner()

    def after_step(self, step: int, parts: Sequence[Part], result: StepResult, lr: float) -> None:
        """Check the counts of an optimizer step. The batch of a skipped step is saved."""
        if result.skipped:
            self._keep(step, parts)
            return
        self.moved |= must_move(lr, result.grad_norm)
        for part, seen in zip(parts, result.parts, strict=True):
            check_trained(part.rollouts, seen.trained)
            check_counts(part, seen)

    def after_metrics(self, row: Mapping[str, Any]) -> None:
        """Check the metrics of a step, and print warnings."""
        for warning in self.steps.check(row):
            self.say(f"warning: {warning}")

    def _due(self, step: int) -> bool:
        return bool(self.interval) and step - self.checked >= self.interval

    def _keep(self, step: int, parts: Sequence[Part]) -> None:
        folder = self.directory / f"step-{step:08d}"
        rollouts = [asdict(r) for part in parts for r in part.rollouts]
        tensors = {
            f"{sample_id} {f.name}": value.clone()
            for part in parts
            for sample_id, score in part.scores.items()
            for f in fields(score)
            if isinstance(value := getattr(score, f.name), Tensor)
        }
        with atomic_directory(folder) as partial:
            lines = "".join(json.dumps(row) + "\n" for row in rollouts)
            (partial / "rollouts.jsonl").write_text(lines, encoding="utf-8")
            (partial / "scores.safetensors").write_bytes(save(tensors))
        self.say(
            f"warning: step {step} was skipped because its loss or gradient is not finite. Its "
            f"batch was saved to {folder}."
        )
