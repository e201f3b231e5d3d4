"""Two-step training: sample and score with the teacher first, train without it later."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress

import torch

from seqkd.checks.preflight import Checked
from seqkd.config.phases import PhaseConfig
from seqkd.config.run import Config
from seqkd.config.samplers import RECORDED, SAMPLERS
from seqkd.data.stream import PromptStream
from seqkd.errors import TeacherCacheError
from seqkd.models.output_head import load_head
from seqkd.protocols import Measured, Scores
from seqkd.teachers.cache import (
    CachedSampler,
    CachedTeacher,
    TeacherCache,
    sampling_settings,
    score_form,
)
from seqkd.training.clock import Clock
from seqkd.training.context import phase_spans
from seqkd.training.feed import prompt_batches
from seqkd.training.rollouts import RolloutSource, reference_rollout
from seqkd.types import Prompt, Rollout
from seqkd.workers import Workers


def planned(
    config: Config, checked: Checked
) -> Iterator[tuple[int, PhaseConfig, list[list[Prompt]]]]:
    """Yield every draw of sampler=teacher_cache in the run: its first step, its phase, and the
    prompts of each step."""
    for span in phase_spans(config):
        train = PromptStream(checked.train, config.seed)
        corpus = PromptStream(checked.corpus, config.seed)
        step = span.first
        for prompts in prompt_batches(config, span, train, corpus):
            if RECORDED in prompts:
                yield step, span.config, prompts[RECORDED]
            step += len(prompts[span.config.sampler])


def record(
    config: Config,
    workers: Workers,
    checked: Checked,
    report: Callable[[int, int], None],
) -> None:
    """Fill the cache behind ``workers`` with the completions and scores that sampler=teacher_cache
    and the held-out evaluation will read. Entries that exist are not requested again.
    ``report(steps, tokens)`` is called after each draw."""
    steps = tokens = 0
    for step, phase, batches in planned(config, checked):
        drawn = RolloutSource(config, phase, RECORDED, workers).draw(batches, step, Clock())
        steps += len(batches)
        tokens += sum(len(r.completion_ids) for rollouts in drawn.steps for r in rollouts)
        report(steps, tokens)
    if config.two_step and checked.heldout:
        samples = [config.evaluation.samples_per_prompt] * len(checked.heldout)
        rollouts = workers.teacher_sampler.sample(checked.heldout, samples, config.seed)
        if workers.distribution:
            workers.teacher.score(rollouts)


def check_recorded(config: Config, caches: Mapping[str, TeacherCache], checked: Checked) -> None:
    """Raise TeacherCacheError unless the caches contain all entries that a run without a teacher
    will read."""
    samplers, teachers = {}, {}
    for name, teacher in config.teachers.items():
        settings = sampling_settings(teacher, config.rollout.max_tokens, checked.stop_ids)
        samplers[name] = CachedSampler(None, caches[name], settings)
        form = score_form(teacher, checked.vocabulary)
        teachers[name] = CachedTeacher(None, caches[name], form, name)
    prompts, completions = set(), 0

    def look(
        prompt: Prompt, samples: int, scored: bool, own: bool, temperature: float, top_p: float
    ) -> None:
        nonlocal completions
        name = config.teacher.choose(prompt.tag, prompt.prompt_id)
        rollouts: list[Rollout] = [reference_rollout(prompt, "dataset")] if own else []
        if not own:
            with suppress(TeacherCacheError):
                rollouts = samplers[name].sample([prompt], [samples], 0, temperature, top_p)
        if not rollouts:
            prompts.add(prompt.prompt_id)
        completions += len(teachers[name].missing(rollouts)) if scored else 0

    rollout = config.rollout
    for _, phase, batches in planned(config, checked):
        terms = phase.by_sampler[RECORDED]
        scored = any(term.objective.teacher_need != "nothing" for term in terms)
        own = SAMPLERS[config.source(RECORDED)].from_data
        samples = config.samples_per_prompt(phase)
        for prompt in (p for batch in batches for p in batch):
            look(prompt, samples, scored, own, rollout.temperature, rollout.top_p)
    for prompt in checked.heldout:
        samples = config.evaluation.samples_per_prompt
        look(prompt, samples, config.teacher.distribution, False, 1.0, 1.0)
    if prompts or completions:
        where = ", ".join(str(cache.directory) for cache in caches.values())
        raise TeacherCacheError(
            f"teacher_cache.path: {where} lacks completions of {len(prompts)} prompts and "
            f"scores of {completions} completions that this run needs. Run seqkd precompute with "
            "the same configuration; existing entries are kept."
        )


class TeacherAlone:
    """Replacement of the learner for runs without one. It only computes teacher log-probs."""

    def __init__(self, config: Config) -> None:
        self.heads = {
            name: load_head(teacher.model, teacher.precision)
            for name, teacher in config.teachers.items()
            if teacher.scores == "hidden"
        }

    def measure(self, rollouts: Sequence[Rollout], scores: Scores) -> Measured:
        """Return the teacher's log-probs. See :class:`seqkd.protocols.Learner`."""
        return {r.sample_id: {"teacher_logprob": self._logprobs(r, scores)} for r in rollouts}

    def _logprobs(self, rollout: Rollout, scores: Scores) -> list[float]:
        score = scores[rollout.sample_id]
        if score.hidden is None:
            assert score.logprobs is not None
            return score.logprobs.tolist()
        targets = torch.tensor(rollout.completion_ids)
        return self.heads[score.teacher].logprobs(score.hidden, targets)[0].tolist()
