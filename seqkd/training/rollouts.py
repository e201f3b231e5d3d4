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
from seqkd.errors import ModelError
from seqkd.learner.running_costs import by_position
from seqkd.objectives import mixture_weight
from seqkd.protocols import Finished, Sampler, Scores
from seqkd.training.clock import Clock
from seqkd.types import Prompt, Rollout, Source, TeacherScore
from seqkd.workers import Workers, renumbered


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
    closed.

    Completions are scored in groups of consecutive prompts, each group in one request as soon as it
    is complete. The groups do not depend on the order in which completions arrive, because the last
    bits of a score depend on the other sequences of its batch.
    """

    def __init__(
        self,
        score: Callable[[Sequence[Rollout]], Scores],
        samples: int,
        together: int | None = None,
    ) -> None:
        """Create the scoring of a draw with ``samples`` completions per prompt. A group has at
        least ``together`` completions. If unset, all are scored at the end in one group."""
        self.score, self.samples = score, samples
        self.prompts = -(-together // samples) if together else None
        self.waiting: dict[int, list[Rollout]] = {}
        self.begun: dict[int, Future[Scores]] = {}
        self.thread = ThreadPoolExecutor(1)

    def close(self) -> None:
        """Wait for running requests and cancel the others."""
        self.thread.shutdown(cancel_futures=True)

    def finished(self, prompt: int, rollout: Rollout) -> None:
        """Add a finished completion of a prompt while others may still be sampled."""
        if self.prompts is None:
            return
        group = self.waiting.setdefault(prompt // self.prompts, [])
        group.append(rollout)
        if len(group) == self.prompts * self.samples:
            self.begun[prompt // self.prompts] = self.thread.submit(self._scores, group)

    def all(self, rollouts: Sequence[Rollout]) -> Scores:
        """Return the scores of all completions, which are in the order of their prompts."""
        size = self.prompts * self.samples if self.prompts else len(rollouts)
        scores: dict[str, TeacherScore] = {}
        for begun in self.begun.values():
            scores |= begun.result()
        for group, first in enumerate(range(0, len(rollouts), size)):
            if group not in self.begun:
                scores |= self._scores(rollouts[first : first + size])
        return scores

    def _scores(self, group: Sequence[Rollout]) -> Scores:
        ordered = sorted(group, key=lambda r: r.sample_id)
        completed = [r for r in ordered if not r.refused]
        return self.score(completed) if completed else {}


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
        self.from_data = SAMPLERS[self.source].from_data
        self.terms = phase.by_sampler[sampler]
        self.fraction = config.rollout.teacher_fraction if SAMPLERS[sampler].weighted else None
        needs = {term.objective.teacher_need for term in self.terms}
        self.scored = needs != {"nothing"} or self.fraction is not None
        self.needs_costs = any(term.objective.running for term in self.terms)

    def draw(self, batches: Sequence[Sequence[Prompt]], step: int, clock: Clock) -> ScoredRollouts:
        """Sample and score together the completions for ``len(batches)`` steps from ``step``
        on."""
        prompts = [p for batch in batches for p in batch]
        samples = 1 if self.from_data else self.config.samples_per_prompt(self.phase)
        together = self.config.scored_together if self.scored else None
        with closing(Scoring(self.workers.teacher.score, samples, together)) as scoring:
            by_prompt = iter(self._rollouts(prompts, step, clock, scoring.finished))
            steps = [[r for _ in batch for r in next(by_prompt)] for batch in batches]
            rollouts = [r for batch in steps for r in batch]
            with clock("score"):
                scores = scoring.all(rollouts) if self.scored else {}
        asked = self.scored or any(rollout.source == "teacher" for rollout in rollouts)
        return ScoredRollouts(steps, scores, self.workers.usage() if asked else {})

    def split(
        self, rollouts: list[Rollout], scores: Scores
    ) -> tuple[list[Rollout], list[Rollout], int]:
        """Return the completions to train on, those masked because they are truncated, and the
        number of completions without text or score, because an endpoint refused it.

        Raises ModelError if the endpoint refused all of them.
        """
        refused = {r.sample_id for r in rollouts if r.refused}
        refused |= {r.sample_id for r in rollouts if r.sample_id in scores
                    and scores[r.sample_id].refused}  # fmt: skip
        kept = [r for r in rollouts if r.sample_id not in refused]
        if not kept:
            raise ModelError(
                f"teacher.on_refusal: the endpoint refused all {len(rollouts)} completions of a "
                "step, so nothing is left to train on. Check the endpoint, or remove the prompts "
                "that it refuses."
            )
        skipped = len(rollouts) - len(kept)
        mask = self.config.rollout.mask_truncated and not self.from_data
        cut = [r for r in kept if mask and r.finish_reason == "length"]
        if not cut or len(cut) == len(kept):
            return kept, [], skipped
        return [r for r in kept if r.finish_reason == "stop"], cut, skipped

    def _rollouts(
        self, prompts: list[Prompt], step: int, clock: Clock, finished: Finished
    ) -> list[list[Rollout]]:
        """Return the completions of each prompt. ``finished`` is called with each sampled
        completion as it arrives."""
        if self.from_data:
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
        places = [i for i, number in enumerate(samples) if number]
        chosen, numbers = [prompts[i] for i in places], [int(samples[i]) for i in places]
        how = self.config.rollout.temperature, self.config.rollout.top_p
        drawn: Iterator[Rollout] = iter(())
        if places:
            report = renumbered(finished, places)
            drawn = iter(sampler.sample(chosen, numbers, seed, *how, report))
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
