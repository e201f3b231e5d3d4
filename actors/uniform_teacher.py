"""A teacher for which every token is equally probable, at the places of a scorer and a sampler."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from seqkd.types import Prompt, Rollout, TeacherScore


class UniformScorer:
    """Scores every token with -log(vocabulary)."""

    def start(self, vocabulary: int) -> None:
        """Take the number of tokens."""
        self.vocabulary = vocabulary

    def score(self, rollouts: list[Rollout]) -> list[TeacherScore]:
        """Return one score per rollout, in order."""
        value = -math.log(self.vocabulary)
        return [
            TeacherScore(r.sample_id, logprobs=torch.full((len(r.completion_ids),), value))
            for r in rollouts
        ]


class UniformSampler:
    """Draws tokens until one of them ends the completion."""

    def __init__(self, stop_ids: tuple[int, ...]) -> None:
        self.stop_ids = stop_ids

    def start(self, vocabulary: int) -> None:
        """Take the number of tokens."""
        self.vocabulary = vocabulary

    def sample(
        self,
        prompts: list[Prompt],
        seeds: list[int],
        samples: list[int],
        max_tokens: int,
        temperature: float,
        top_p: float,
    ) -> Iterator[tuple[int, int, Rollout]]:
        """Yield (i, n, completion n of prompt i)."""
        for i, prompt in enumerate(prompts):
            for n in range(samples[i]):
                yield i, n, self._rollout(prompt, seeds[i] + n, max_tokens)

    def _rollout(self, prompt: Prompt, seed: int, max_tokens: int) -> Rollout:
        ids = np.random.default_rng(seed).integers(self.vocabulary, size=max_tokens).tolist()
        ends = [place for place, token in enumerate(ids) if token in self.stop_ids]
        ids = ids[: ends[0] + 1] if ends else ids
        return Rollout(
            prompt_id=prompt.prompt_id,
            sample_id=f"{prompt.prompt_id}/teacher/{seed:08x}",
            prompt_ids=prompt.token_ids,
            completion_ids=tuple(ids),
            rollout_logprobs=(-math.log(self.vocabulary),) * len(ids),
            source="teacher",
            policy_version=0,
            finish_reason="stop" if ends else "length",
            tag=prompt.tag,
        )
