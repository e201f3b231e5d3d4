"""A teacher behind an HTTP endpoint, at the places of an engine that samples and of one that
scores."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from seqkd.config.teacher import EndpointTeacherConfig
from seqkd.errors import ModelError
from seqkd.learner import batching
from seqkd.models.loading import load_tokenizer
from seqkd.teachers.endpoint import EndpointClient, Reply, Request, Scored
from seqkd.types import Prompt, Rollout, TeacherScore

SMALLEST_TAIL = 2.0**-23
"""What the k most probable tokens leave is 1 minus their sum, known to float32's resolution at 1.
A tail of nothing would make a reverse KL infinite."""


class ApiSampler:
    """Asks an endpoint for completions. They come as the student's tokens where the endpoint has
    them (the completions interface, for a teacher that scores), else as text to be tokenized."""

    def __init__(self, stop_ids: tuple[int, ...]) -> None:
        self.stop_ids = stop_ids

    def start(self, config: EndpointTeacherConfig, key: str, tokenizer_from: str) -> None:
        """Load the student's tokenizer. Apart from the constructor, so that a failure keeps its
        cause; ``key`` comes from the driver's environment."""
        self.client = EndpointClient(config, key)
        self.by_id = config.scores != "none"
        self.tokenizer: Any = load_tokenizer(tokenizer_from, "student.model")
        eos = self.tokenizer.eos_token_id
        self.eos_id = self.stop_ids[0] if eos is None else eos

    def sample(
        self,
        prompts: list[Prompt],
        seeds: list[int],
        samples: list[int],
        max_tokens: int,
        temperature: float,
        top_p: float,
    ) -> Iterator[tuple[int, int, Rollout]]:
        """``samples[i]`` completions of prompt i: (i, which of them, it). ``seeds[i]`` is passed
        on, and means what the endpoint makes of it."""
        asked = [(place, index) for place, number in enumerate(samples) for index in range(number)]
        requests = [
            Request(prompts[i].messages, self._prompt(prompts[i]), seeds[i] + n) for i, n in asked
        ]
        replies = self.client.complete(requests, max_tokens, temperature, top_p, self.stop_ids)
        own = temperature == top_p == 1  # else the log-probs are not of what drew the tokens
        for (i, n), reply in zip(asked, replies, strict=True):
            yield i, n, self._rollout(prompts[i], seeds[i] + n, reply, max_tokens, own)

    def usage(self) -> dict[str, int]:
        """What the endpoint was asked for so far."""
        return dict(self.client.used)

    def _prompt(self, prompt: Prompt) -> str | tuple[int, ...]:
        return prompt.token_ids if self.by_id else self.tokenizer.decode(prompt.token_ids)

    def _rollout(
        self, prompt: Prompt, seed: int, reply: Reply, max_tokens: int, own: bool
    ) -> Rollout:
        ids = list(reply.token_ids)
        if not ids:
            ids = self.tokenizer(reply.text, add_special_tokens=False).input_ids
            # A completion that was cut has no end: to give it one would teach to stop mid-sentence.
            ids = [*ids, self.eos_id] if reply.ended else ids
        return Rollout(
            prompt_id=prompt.prompt_id,
            sample_id=f"{prompt.prompt_id}/teacher/{seed:08x}",
            prompt_ids=prompt.token_ids,
            completion_ids=tuple(ids[:max_tokens]),
            rollout_logprobs=reply.logprobs if reply.logprobs and own else None,
            source="teacher",
            policy_version=0,
            finish_reason="stop" if reply.ended and len(ids) <= max_tokens else "length",
            tag=prompt.tag,
        )


class ApiScorer:
    """Asks an endpoint what it thinks of completions, token by token."""

    def start(self, config: EndpointTeacherConfig, key: str, vocabulary: int) -> None:
        """Apart from the constructor, as with the other actors; the student has ``vocabulary``
        tokens. The served model's distribution is over its own, padding included."""
        self.client, self.vocabulary = EndpointClient(config, key), vocabulary
        self.top_k = config.top_k if config.scores == "top_k" else 0

    def score(self, rollouts: list[Rollout]) -> list[TeacherScore]:
        """One score a rollout, in order."""
        scored = self.client.score(
            [[*r.prompt_ids, *r.completion_ids] for r in rollouts], self.top_k
        )
        return [self._score(r, s) for r, s in zip(rollouts, scored, strict=True)]

    def usage(self) -> dict[str, int]:
        """What the endpoint was asked for so far."""
        return dict(self.client.used)

    def _score(self, rollout: Rollout, scored: Scored) -> TeacherScore:
        span = batching.state_span(rollout)
        logprobs = torch.tensor(scored.logprobs[span], dtype=torch.float32)
        if not self.top_k:
            return TeacherScore(rollout.sample_id, logprobs=logprobs)
        top = scored.top[span]
        ids = [[token for token, _ in pairs] for pairs in top]
        if (largest := max(map(max, ids))) >= self.vocabulary:
            raise ModelError(
                f"teacher.scores: the endpoint names token {largest} among the most probable, but "
                f"student.model has {self.vocabulary}. Lower teacher.top_k, or set teacher.scores "
                "to logprobs."
            )
        values = [[value for _, value in pairs] for pairs in top]
        rows = [[*row, _tail(row)] for row in values]
        return TeacherScore(
            rollout.sample_id,
            logprobs=logprobs,
            top_ids=torch.tensor(ids, dtype=torch.int32),
            top_logprobs=torch.tensor(rows, dtype=torch.float32),
        )


def _tail(logprobs: list[float]) -> float:
    return math.log(max(SMALLEST_TAIL, 1 - math.fsum(map(math.exp, logprobs))))
