"""Canary: a fixed probe text that all engines, the learner and all teachers score during a run."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from seqkd.checks.preflight import Checked
from seqkd.checks.probe import UNIFORM, answers, distance, finite, scored_tokens, tolerance
from seqkd.config.run import Config
from seqkd.errors import LearningFault
from seqkd.protocols import Scores
from seqkd.types import Rollout
from seqkd.workers import Workers

RESUME = "Resume from the last checkpoint"
SMALLEST_LR = 1e-8
"""Smallest learning rate whose step must change the weights. Below it a step may round to zero:
adjacent float32 values near 0.02 are 2e-9 apart."""
RESOLUTION = {"float32": 1e-7, "bfloat16": 1e-3}
"""Nats per token, by the engine's precision. If the learner's log-probs changed by more than this,
an engine with the new weights cannot return the old log-probs at every token."""


def must_move(lr: float, grad_norm: float) -> bool:
    """Return True if an optimizer step that was not skipped must have changed the weights."""
    return lr >= SMALLEST_LR and grad_norm > 0


class EngineBaseline(NamedTuple):
    """Log-probs of the probe when an engine's answer last changed, from the engine and from the
    learner."""

    engine: Tensor
    learner: Tensor


@dataclass(frozen=True)
class ProbeResponses:
    """Answers of engines and teachers to the probe. The learner turns the teachers' scores into
    log-probs."""

    version: int
    """Version of the weights that the engines should have loaded."""
    engines: list[list[float]]
    """Log-probs, one list per engine. Empty if the engines should not have that version yet."""
    scores: Mapping[str, Scores]
    """Scores by teacher name."""


@dataclass(frozen=True)
class ProbeLogprobs:
    """Log-probs of the probe's tokens, of shape [T] each."""

    version: int
    """Version of the weights that the engines should have loaded."""
    learner: Tensor
    """Log-probs from the learner's current weights."""
    drawer: Tensor
    """Log-probs from the learner's weights of ``version``."""
    engines: list[Tensor]
    teachers: dict[str, list[Tensor]]
    """Log-probs by teacher name, one tensor per actor."""


class Canary:
    """Scoring of the probe by engines, learner and teachers. Scores come from the actors
    themselves, never from a cache."""

    def __init__(
        self, config: Config, checked: Checked, workers: Workers, roles: Collection[str]
    ) -> None:
        self.config, self.workers, self.vocabulary = config, workers, checked.vocabulary
        self.engines = "rollout" in roles
        self.teachers = dict(workers.teachers) if "teacher" in roles else {}
        self.texts = {
            name: answers(checked, f"canary/{name}", self._actors(name)) for name in self.teachers
        }
        self.own = next(iter(self.texts.values()), []) or answers(checked, "canary", 1)
        self.begin({})

    def begin(self, first: Mapping[str, list[float]]) -> None:
        """Start again with another learner. ``first`` contains each teacher's first answer, by
        name."""
        self.first = dict(first)
        self.learner: Tensor | None = None
        self.baselines: list[EngineBaseline] = []
        self.expected: dict[int, Tensor] = {}
        """The learner's log-probs by version, for the versions that engines may answer with."""

    def ask(self, version: int) -> ProbeResponses:
        """Have engines and teachers score the probe; the learner may be running meanwhile. Engines
        are asked only if they have ``version`` of the learner's weights."""
        student, text = self.workers.student, self.own[0]
        engines = []
        if self.engines and student.policy_version == version:
            engines = student.logprobs([*text.prompt_ids, *text.completion_ids])
        scores = {name: self.teachers[name].score(texts) for name, texts in self.texts.items()}
        return ProbeResponses(version, engines, scores)

    def hold(self) -> None:
        """Score the probe with the learner's current weights. Required if engines are asked with
        these weights and :meth:`check` is called only after the learner's next step."""
        version = self.workers.learner.policy_version
        if version not in self.expected:
            self.expected[version] = self._learner()

    def check(self, asked: ProbeResponses, stepped: bool) -> None:
        """Raise LearningFault with one line per fault. ``stepped``: since the last call, an
        optimizer step was taken that :func:`must_move` the weights."""
        faults = self._unscored(asked.scores)
        if not faults:
            now = self._answers(asked)
            faults = self._not_numbers(now) or [
                *self._frozen(now.learner, stepped),
                *self._engines(now),
                *self._teachers(now.teachers),
            ]
            self._keep(now)
        if faults:
            raise LearningFault("\n".join(faults))

    def check_learner(self) -> None:
        """Raise LearningFault if the learner's log-probs of the probe are not finite."""
        logprobs = self._learner()
        if faults := self._not_numbers(ProbeLogprobs(0, logprobs, logprobs, [], {})):
            raise LearningFault("\n".join(faults))

    def _learner(self) -> Tensor:
        measured = self.workers.learner.measure(self.own[:1], {})
        return torch.tensor(measured[self.own[0].sample_id]["student_logprob"])

    def _answers(self, asked: ProbeResponses) -> ProbeLogprobs:
        texts = [text for group in self.texts.values() for text in group]
        scores = {i: score for group in asked.scores.values() for i, score in group.items()}
        measured = self.workers.learner.measure(texts, scores) if texts else {}

        def teachers(texts: Sequence[Rollout]) -> list[Tensor]:
            return [torch.tensor(measured[text.sample_id]["teacher_logprob"]) for text in texts]

        # The probe is always scored in a batch of its own, because other batches change the last
        # bits of its log-probs.
        learner, before = self._learner(), self.expected
        self.expected = {self.workers.learner.policy_version: learner}
        tokens = len(self.own[0].completion_ids)
        return ProbeLogprobs(
            asked.version,
            learner,
            (before | self.expected)[asked.version],
            [torch.tensor(engine[-tokens:]) for engine in asked.engines],
            {name: teachers(texts) for name, texts in self.texts.items()},
        )

    def _keep(self, now: ProbeLogprobs) -> None:
        self.learner = now.learner
        if now.engines:
            before: Sequence[EngineBaseline | None] = self.baselines or [None] * len(now.engines)
            self.baselines = [
                baseline
                if baseline and torch.equal(baseline.engine, engine)
                else EngineBaseline(engine, now.drawer)
                for baseline, engine in zip(before, now.engines, strict=True)
            ]

    def _unscored(self, scores: Mapping[str, Scores]) -> list[str]:
        return [
            f"canary: {self._label(name)} returned no log-prob for some tokens of the probe text. "
            f"Its scores were lost in transit. {RESUME}, with --verbose to see its log."
            for name, texts in self.texts.items()
            if any(scored_tokens(scores[name][t.sample_id]) < len(t.completion_ids) for t in texts)
        ]

    def _not_numbers(self, now: ProbeLogprobs) -> list[str]:
        named = {"the learner": [now.learner]}
        named |= {f"rollout engine {i}": [engine] for i, engine in enumerate(now.engines)}
        named |= {self._label(name): answers for name, answers in now.teachers.items()}
        return [
            f"canary: {name} returned non-finite log-probs for the probe text. Its weights or its "
            f"computation are broken. {RESUME}. If it happens again, set its precision to float32"
            + (", or lower learner.lr." if name == "the learner" else ".")
            for name, answers in named.items()
            if not all(map(finite, answers))
        ]

    def _frozen(self, now: Tensor, stepped: bool) -> list[str]:
        """Return a fault if a step did not change the learner. In bfloat16 a small step may round
        to zero, so only float32 is checked."""
        exact = self.config.learner.precision == "float32"
        if not (stepped and exact and self.learner is not None and torch.equal(now, self.learner)):
            return []
        return [
            "canary: the learner's weights do not change: its probe log-probs are bit-identical "
            f"before and after an optimizer step (mean {now.mean():.4g}). The optimizer updates "
            "parameters that the model does not use, or learner.lr is too small. "
            f"{RESUME} with a higher learner.lr. If it happens again, set learner.zero_stage to 0."
        ]

    def _engines(self, now: ProbeLogprobs) -> list[str]:
        most = tolerance(self.config.rollout.precision, self.config.learner.precision)
        faults = []
        for index, engine in enumerate(now.engines):
            gap = distance(engine, now.drawer)
            fault = self._lost(engine, now.drawer) if gap > most else None
            fault = fault or self._stale(engine, now.drawer, index)
            fault = fault or (self._differs(gap, most, now.version) if gap > most else None)
            if fault:
                faults.append(f"canary: rollout engine {index} {fault}")
        return faults

    def _lost(self, engine: Tensor, learner: Tensor) -> str | None:
        if not self._is_uniform(engine) or self._is_uniform(learner):
            return None
        return (
            f"has lost its weights: its mean probe log-prob is {engine.mean():.4g} per token, as "
            f"by guessing (-ln V = {-math.log(self.vocabulary):.4g}), while the learner's is "
            f"{learner.mean():.4g}. It woke up without weights, or a weight sync omitted its "
            f"output head. {RESUME}, which restarts the engine."
        )

    def _stale(self, engine: Tensor, learner: Tensor, index: int) -> str | None:
        baseline = self.baselines[index] if self.baselines else None
        moved = distance(learner, baseline.learner) if baseline else 0.0
        least = RESOLUTION[self.config.rollout.precision]
        if baseline is None or not torch.equal(engine, baseline.engine) or moved <= least:
            return None
        return (
            "has stale weights: its probe log-probs are bit-identical to those before the last "
            f"weight sync, although the learner's changed by {moved:.3g} nats per token. It "
            f"acknowledged the sync but kept the old weights. {RESUME}, which restarts the engine."
        )

    def _differs(self, gap: float, most: float, version: int) -> str:
        rollout, trained = self.config.rollout.precision, self.config.learner.precision
        return (
            f"does not have the learner's weights: their probe log-probs differ by {gap:.3g} nats "
            f"per token (limit {most:g}), although the engine loaded version {version} of the "
            "weights. The weight sync failed in the engine, or precisions of "
            f"{rollout} (engine) and {trained} (learner) are too coarse for this model. {RESUME}. "
            "If it happens again, set rollout.precision and learner.precision to float32."
        )

    def _teachers(self, now: dict[str, list[Tensor]]) -> list[str]:
        faults = []
        for name, responses in now.items():
            first = torch.tensor(self.first.setdefault(name, responses[0].tolist()))
            for index, answer in enumerate(responses):
                if fault := self._zeros(answer) or self._swapped(name, answer, first):
                    faults.append(f"canary: {self._label(name)}, actor {index}, {fault}")
        return faults

    def _zeros(self, answer: Tensor) -> str | None:
        uniform = -math.log(self.vocabulary)
        lost = bool(torch.isclose(answer, torch.tensor(uniform), rtol=1e-5, atol=0).all())
        if not lost and answer.any():
            return None
        what = (
            f"returned hidden states of zeros: every probe log-prob is -ln V = {uniform:.4g}"
            if lost
            else "returned scores of zeros: every probe log-prob is 0"
        )
        return (
            f"{what}. Scoring failed and the scores were filled with zeros, or the teacher lost "
            f"its weights. {RESUME}, with --verbose to see the teacher's log."
        )

    def _swapped(self, name: str, answer: Tensor, first: Tensor) -> str | None:
        precision = self.config.teachers[name].precision
        gap, most = distance(answer, first), tolerance(precision)
        if gap <= most:
            return None
        return (
            f"has changed: its probe log-probs differ by {gap:.3g} nats per token from its first "
            f"ones (limit {most:g} in {precision}), mean {answer.mean():.4g}, first "
            f"{first.mean():.4g}. Another model is served under its name, or its scores are "
            "assigned to the wrong tokens. Check that every node or endpoint serves "
            f"{self.config.teachers[name].model!r}. {RESUME}."
        )

    def _is_uniform(self, answer: Tensor) -> bool:
        surprise = -answer.mean().item() / math.log(self.vocabulary)
        return UNIFORM[0] <= surprise <= UNIFORM[1]

    def _actors(self, name: str) -> int:
        return self.config.teachers[name].scoring.actors

    def _label(self, name: str) -> str:
        return f"teacher {name}" if name else "the teacher"
