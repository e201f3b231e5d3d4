"""Completions that a step trains on, with their teacher scores."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from seqkd.config.phases import PhaseConfig
from seqkd.config.run import Config
from seqkd.config.samplers import SAMPLERS, SamplerName
from seqkd.learner.running_costs import by_position
from seqkd.objectives import mixture_weight
from seqkd.protocols import Finished, Sampler, Scores
from seqkd.training.clock import Clock
from seqkd.types import Prompt, Rollout, Source
from seqkd.workers import Workers


@dataclass(frozen=True)
class ScoredRollouts:
    """Completions of one sampler for one or more steps, and their teacher scores."""

    steps: list[list[Rollout]]
    """Completions by step."""
    scores: Scores
    usage: dict[str, int]
    """Requests and tokens used at the teachers' endpoints so far."""


class Scoring:
    """Teacher scoring of a draw that starts before all its completions are sampled. It must be
    closed."""

    def __init__(
        self, score: Callable[[Sequence[Rollout]], Scores], together: int | None = None
    ) -> None:
        """Create the scoring. Finished completions are scored in groups of ``together``. If unset,
        all are scored at the end."""
        self.score, self.together = score, together
        self.waiting: list[Rollout] = []
        self.begun: list[Future[Scores]] = []
        self.thread = ThreadPoolExecutor(1)

    def close(self) -> None:
        """Wait for running requests and cancel the others."""
        self.thread.shutdown(cancel_futures=True)

    def finished(self, rollout: Rollout) -> None:
        """Add a finished completion while others may still be sampled."""
        self.waiting.append(rollout)
        if len(self.waiting) == self.together:
            self.begun.append(self.thread.submit(self.score, self.waiting))
            self.waiting = []

    def all(self, rollouts: Sequence[Rollout]) -> Scores:
        """Return the scores of all completions."""
        scores = {
            sample_id: score
            for future in self.begun
            for sample_id, score in future.result().items()
        }
        rest = [r for r in rollouts if r.sample_id not in scores]
        return {**scores, **(self.score(rest) if rest else {})}


class RolloutSource:
    """Source of completions of one sampler for one phase."""

    def __init__(
        self,
        config: Config,
        phase: PhaseConfig,
        sampler: SamplerName,
        workers: Workers,
    ) -> None:
        self.config, self.phase, self.sampler, self.workers = config, phase, sampler, workers
        self.source = config.source(sampler)
        self.asks_student = SAMPLERS[sampler].on_student
        self.terms = phase.by_sampler[sampler]
        self.fraction = config.rollout.teacher_fraction if SAMPLERS[sampler].weighted else None
        needs = {term.objective.teacher_need for term in self.terms}
        self.scored = needs != {"nothing"} or self.fraction is not None
        self.needs_costs = any(term.objective.running for term in self.terms)

    def draw(self, batches: Sequence[Sequence[Prompt]], step: int, clock: Clock) -> ScoredRollouts:
        """Sample and score together the completions for ``len(batches)`` steps from ``step``
        on."""
        prompts = [p for batch in batches for p in batch]
        together = self.config.scored_together if self.scored else None
        with closing(Scoring(self.workers.teacher.score, together)) as scoring:
            by_prompt = iter(self._rollouts(prompts, step, clock, scoring.finished))
            steps = [[r for _ in batch for r in next(by_prompt)] for batch in batches]
            rollouts = [r for batch in steps for r in batch]
            with clock("score"):
                scores = scoring.all(rollouts) if self.scored else {}
        asked = self.scored or any(rollout.source == "teacher" for rollout in rollouts)
        return ScoredRollouts(steps, scores, self.workers.usage() if asked else {})

    def split(self, rollouts: list[Rollout]) -> tuple[list[Rollout], list[Rollout]]:
        """Return the completions to train on, and those masked because they are truncated."""
        mask = self.config.rollout.mask_truncated and not SAMPLERS[self.source].from_data
        cut = [r for r in rollouts if mask and r.finish_reason == "length"]
        if not cut or len(cut) == len(rollouts):
            return rollouts, []
        return [r for r in rollouts if r.finish_reason == "stop"], cut

    def _rollouts(
        self, prompts: list[Prompt], step: int, clock: Clock, finished: Finished
    ) -> list[list[Rollout]]:
        """Return the completions of each prompt. ``finished`` is called with each sampled
        completion as it arrives."""
        if SAMPLERS[self.source].from_data:
            return [[reference_rollout(p, cast(Source, self.source))] for p in prompts]
        # Held-out evaluation samples with the plain seed, which training never uses.
        seed = (self.config.seed + 1) * 1_000_003 + step
        samples = self.config.samples_per_prompt(self.phase)
        from_teacher = np.zeros(len(prompts), dtype=int)
        if self.fraction is not None:
            generator = np.random.default_rng([self.config.seed, step])
            from_teacher = generator.binomial(samples, self.fraction, len(prompts))
        elif SAMPLERS[self.source].on_teacher:
            from_teacher[:] = samples
        student, teacher = self.workers.student, self.workers.teacher_sampler
        with clock("sample"):
            by_student = self._sample(student, prompts, samples - from_teacher, seed, finished)
            by_teacher = self._sample(teacher, prompts, from_teacher, seed, finished)
        return [[*a, *b] for a, b in zip(by_student, by_teacher, strict=True)]

    def _sample(
        self,
        sampler: Sampler,
        prompts: list[Prompt],
        samples: np.ndarray,
        seed: int,
        finished: Finished,
    ) -> list[list[Rollout]]:
        wanted = [(p, int(n)) for p, n in zip(prompts, samples, strict=True) if n]
        rollout = self.config.rollout
        drawn: Iterator[Rollout] = iter(())
        if wanted:
            chosen, numbers = zip(*wanted, strict=True)
            how = rollout.temperature, rollout.top_p
            drawn = iter(sampler.sample(chosen, numbers, seed, *how, finished))
        return [[next(drawn) for _ in range(n)] for n in samples]

    def costs(self, rollouts: list[Rollout], scores: Scores) -> tuple[Tensor, Tensor]:
        """Measure the current student on a batch. Returns two tensors of shape [T]: the weighted
        sum of costs per position, and the total weight of the sequences with a token there."""
        rows = []
        for values in self.workers.learner.measure(rollouts, scores).values():
            weight = 1.0
            if self.fraction is not None:
                student, teacher = (
                    torch.tensor(sum(values[n])) for n in ("student_logprob", "teacher_logprob")
                )
                weight = mixture_weight(student, teacher, self.fraction).item()
            costs = values.get("reverse_kl") or [
                q - p
                for q, p in zip(values["student_logprob"], values["teacher_logprob"], strict=True)
            ]
            rows.append((weight, costs))
        return by_position(rows)


def reference_rollout(prompt: Prompt, source: Source) -> Rollout:
    """Return a prompt's reference text as a completion."""
    assert prompt.reference_ids is not None
    answer = hashlib.blake2b(repr(prompt.reference_ids).encode(), digest_size=4).hexdigest()
    return Rollout(
        prompt_id=prompt.prompt_id,
        sample_id=f"{prompt.prompt_id}/{source}/{answer}",
        prompt_ids=prompt.token_ids,
        completion_ids=prompt.reference_ids,
        rollout_logprobs=None,
        source=source,
        policy_version=0,
        finish_reason="length" if prompt.reference_cut else "stop",
        tag=prompt.tag,
    )
