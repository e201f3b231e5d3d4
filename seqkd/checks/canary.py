"""A known text that every engine, the learner and every teacher score again while a run goes on."""

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

GO_ON = "Go on from the last checkpoint"
SMALLEST_LR = 1e-8
"""Below it a step may round to nothing: float32 weights of 0.02 lie 2e-9 apart."""
RESOLUTION = {"float32": 1e-7, "bfloat16": 1e-3}
"""Nats a token. Where the learner has moved by more, an engine of that precision with its weights
cannot give the same at every token."""


def must_move(lr: float, grad_norm: float) -> bool:
    """Whether an optimizer step, unless it was skipped, must have changed the weights."""
    return lr >= SMALLEST_LR and grad_norm > 0


class EngineBaseline(NamedTuple):
    """What an engine said when its answer last changed, and the learner at that time."""

    engine: Tensor
    learner: Tensor


@dataclass(frozen=True)
class ProbeResponses:
    """What engines and teachers said of the known text, for the learner to read."""

    version: int
    """Of the weights that the engines were to have."""
    engines: list[list[float]]
    """Log-probs, a list for every engine; none where they were not to have them."""
    scores: Mapping[str, Scores]
    """By the teacher's name."""


@dataclass(frozen=True)
class ProbeLogprobs:
    """[T] log-probs of the known text's tokens."""

    version: int
    """Of the weights that the engines were to have."""
    learner: Tensor
    drawer: Tensor
    """The learner's with that version."""
    engines: list[Tensor]
    teachers: dict[str, list[Tensor]]
    """By name, one for every actor."""


class Canary:
    """Scores the probe by the actors themselves; a cache must not answer in their place."""

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
        """Start again with another learner; ``first`` has each teacher's first answer, by name."""
        self.first = dict(first)
        self.learner: Tensor | None = None
        self.held: list[EngineBaseline] = []
        self.said: dict[int, Tensor] = {}
        """The learner's answers by version, of those that engines may be asked with."""

    def ask(self, version: int) -> ProbeResponses:
        """Engines and teachers, whatever the learner does meanwhile; engines only where they have
        ``version`` of its weights."""
        student, text = self.workers.student, self.own[0]
        engines = []
        if self.engines and student.policy_version == version:
            engines = student.logprobs([*text.prompt_ids, *text.completion_ids])
        scores = {name: self.teachers[name].score(texts) for name, texts in self.texts.items()}
        return ProbeResponses(version, engines, scores)

    def hold(self) -> None:
        """What the learner says with today's weights, where engines are asked with them and
        :meth:`check` is called only after its next step."""
        version = self.workers.learner.policy_version
        if version not in self.said:
            self.said[version] = self._learner()

    def check(self, asked: ProbeResponses, stepped: bool) -> None:
        """LearningFault, a line for each fault found. ``stepped``: since the last call an optimizer
        step was taken that :func:`must_move` the weights."""
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
        """LearningFault where the learner gives the known text what is no number."""
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

        # Always the text alone: in other company its log-probs differ in their last bits.
        learner, before = self._learner(), self.said
        self.said = {self.workers.learner.policy_version: learner}
        tokens = len(self.own[0].completion_ids)
        return ProbeLogprobs(
            asked.version,
            learner,
            (before | self.said)[asked.version],
            [torch.tensor(engine[-tokens:]) for engine in asked.engines],
            {name: teachers(texts) for name, texts in self.texts.items()},
        )

    def _keep(self, now: ProbeLogprobs) -> None:
        self.learner = now.learner
        if now.engines:
            before: Sequence[EngineBaseline | None] = self.held or [None] * len(now.engines)
            self.held = [
                held
                if held and torch.equal(held.engine, engine)
                else EngineBaseline(engine, now.drawer)
                for held, engine in zip(before, now.engines, strict=True)
            ]

    def _unscored(self, scores: Mapping[str, Scores]) -> list[str]:
        return [
            f"canary: {self._called(name)} gave tokens of a known text no log-prob. Its scores are "
            f"lost on the way. {GO_ON}; see its log with --verbose."
            for name, texts in self.texts.items()
            if any(scored_tokens(scores[name][t.sample_id]) < len(t.completion_ids) for t in texts)
        ]

    def _not_numbers(self, now: ProbeLogprobs) -> list[str]:
        named = {"the learner": [now.learner]}
        named |= {f"rollout engine {i}": [engine] for i, engine in enumerate(now.engines)}
        named |= {self._called(name): answers for name, answers in now.teachers.items()}
        return [
            f"canary: {name} gives tokens of a known text log-probs that are no finite numbers. "
            f"Its weights or its computation are broken. {GO_ON}; if it comes again, set its "
            "precision to float32" + (", or lower learner.lr." if name == "the learner" else ".")
            for name, answers in named.items()
            if not all(map(finite, answers))
        ]

    def _frozen(self, now: Tensor, stepped: bool) -> list[str]:
        """In bfloat16 a small step may round to nothing."""
        exact = self.config.learner.precision == "float32"
        if not (stepped and exact and self.learner is not None and torch.equal(now, self.learner)):
            return []
        return [
            "canary: an optimizer step was taken, and the learner gives a known text the same "
            f"log-probs as before it, to the last bit (mean {now.mean():.4g}): its weights do not "
            "change. The optimizer holds other parameters than the model computes with, or "
            f"learner.lr is too small for them. {GO_ON} with a higher learner.lr; if it stays, set "
            "learner.zero_stage to 0."
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
        if not self._knows_nothing(engine) or self._knows_nothing(learner):
            return None
        return (
            f"gives a known text a mean log-prob of {engine.mean():.4g} a token, as a guess would "
            f"(-ln V = {-math.log(self.vocabulary):.4g}), where the learner gives "
            f"{learner.mean():.4g}: its weights are lost. It woke without them, or a sync left out "
            f"its output head. {GO_ON}: that starts the engine anew."
        )

    def _stale(self, engine: Tensor, learner: Tensor, index: int) -> str | None:
        held = self.held[index] if self.held else None
        moved = distance(learner, held.learner) if held else 0.0
        least = RESOLUTION[self.config.rollout.precision]
        if held is None or not torch.equal(engine, held.engine) or moved <= least:
            return None
        return (
            f"gives a known text the same log-probs as before the last weight sync, to the last "
            f"bit, while the learner's have moved by {moved:.3g} nats a token: its weights are "
            f"stale. It acknowledged the sync and kept the old ones. {GO_ON}: that starts the "
            "engine anew."
        )

    def _differs(self, gap: float, most: float, version: int) -> str:
        rollout, trained = self.config.rollout.precision, self.config.learner.precision
        return (
            f"gives a known text other log-probs than the learner, by {gap:.3g} nats a token (at "
            f"most {most:g}), though it has taken in version {version} "
            "of the weights: it does not hold the learner's weights. A sync went wrong in the "
            f"engine, or a precision of {rollout} and {trained} is too coarse for this model. "
            f"{GO_ON}; if it comes again, set rollout.precision and learner.precision to float32."
        )

    def _teachers(self, now: dict[str, list[Tensor]]) -> list[str]:
        faults = []
        for name, responses in now.items():
            first = torch.tensor(self.first.setdefault(name, responses[0].tolist()))
            for index, answer in enumerate(responses):
                if fault := self._zeros(answer) or self._swapped(name, answer, first):
                    faults.append(f"canary: {self._called(name)}, actor {index}, {fault}")
        return faults

    def _zeros(self, answer: Tensor) -> str | None:
        uniform = -math.log(self.vocabulary)
        lost = bool(torch.isclose(answer, torch.tensor(uniform), rtol=1e-5, atol=0).all())
        if not lost and answer.any():
            return None
        what = (
            f"gives every token of a known text a log-prob of -ln V = {uniform:.4g}: its hidden "
            "states are zeros"
            if lost
            else "gives every token of a known text a log-prob of 0: its scores are zeros"
        )
        return (
            f"{what}. Scoring failed and was filled up, or the teacher's weights are lost. "
            f"{GO_ON}; see the teacher's log with --verbose."
        )

    def _swapped(self, name: str, answer: Tensor, first: Tensor) -> str | None:
        precision = self.config.teachers[name].precision
        gap, most = distance(answer, first), tolerance(precision)
        if gap <= most:
            return None
        return (
            f"gives a known text other log-probs than it first did, by {gap:.3g} nats a token (at "
            f"most {most:g} in {precision}): mean {answer.mean():.4g}, first {first.mean():.4g}. "
            "Another model answers under its name, or its scores stand beside the wrong tokens. "
            f"See that every node or endpoint serves {self.config.teachers[name].model!r}. "
            f"{GO_ON}."
        )

    def _knows_nothing(self, answer: Tensor) -> bool:
        surprise = -answer.mean().item() / math.log(self.vocabulary)
        return UNIFORM[0] <= surprise <= UNIFORM[1]

    def _actors(self, name: str) -> int:
        return self.config.teachers[name].scoring.actors

    def _called(self, name: str) -> str:
        return f"teacher {name}" if name else "the teacher"
