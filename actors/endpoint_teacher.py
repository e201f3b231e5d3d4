"""Actors that sample from and score with a teacher behind an HTTP endpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch

from seqkd.config.teacher import EndpointTeacherConfig
from seqkd.data.content import ContentTokenizer
from seqkd.errors import ModelError
from seqkd.learner import batching
from seqkd.models.loading import load_tokenizer
from seqkd.teachers.endpoint import EndpointClient, Reply, Request, Scored
from seqkd.types import Prompt, Rollout, TeacherScore

SMALLEST_TAIL = 2.0**-23
"""Smallest tail probability. The tail is 1 minus the sum of the top-k probabilities, exact to
float32's resolution at 1. A tail of zero would make a reverse KL infinite."""


class ApiSampler:
    """Sampler of completions from an endpoint. A teacher that scores returns the student's token
    ids (completions interface). Other teachers return text, which is tokenized here."""

    def __init__(self, stop_ids: tuple[int, ...], content_tokens: tuple[str, ...] = ()) -> None:
        self.stop_ids, self.content_tokens = stop_ids, content_tokens

    def start(self, config: EndpointTeacherConfig, key: str, tokenizer_from: str) -> None:
        """Load the student's tokenizer. This is separate from the constructor so that a failure
        keeps its cause. ``key`` is the API key from the driver's environment."""
        self.client = EndpointClient(config, key)
        self.by_id = config.scores != "none"
        self.tokenizer: Any = load_tokenizer(tokenizer_from, "student.model")
        self.content = ContentTokenizer(self.tokenizer, self.content_tokens)
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
        """Yield ``samples[i]`` completions per prompt i as (i, index, completion). ``seeds[i]`` is
        passed to the endpoint, which may ignore it."""
        asked = [(place, index) for place, number in enumerate(samples) for index in range(number)]
        requests = [
            Request(prompts[i].messages, self._prompt(prompts[i]), seeds[i] + n) for i, n in asked
        ]
        replies = self.client.complete(requests, max_tokens, temperature, top_p, self.stop_ids)
        # Otherwise the endpoint's log-probs are not those of the sampling distribution.
        own = temperature == top_p == 1
        for (i, n), reply in zip(asked, replies, strict=True):
            yield i, n, self._rollout(prompts[i], seeds[i] + n, reply, max_tokens, own)

    def usage(self) -> dict[str, int]:
        """Return the usage counts of the endpoint so far."""
        return dict(self.client.used)

    def _prompt(self, prompt: Prompt) -> str | tuple[int, ...]:
        return prompt.token_ids if self.by_id else self.tokenizer.decode(prompt.token_ids)

    def _rollout(
        self, prompt: Prompt, seed: int, reply: Reply | None, max_tokens: int, own: bool
    ) -> Rollout:
        ids = list(reply.token_ids) if reply else []
        if reply and not ids:
            (ids,) = self.content.content([reply.text])
            # A truncated completion gets no end-of-sequence token: training on one would teach the
            # student to stop in the middle of a sentence.
            ids = [*ids, self.eos_id] if reply.ended else ids
        return Rollout(
            prompt_id=prompt.prompt_id,
            sample_id=f"{prompt.prompt_id}/teacher/{seed:08x}",
            prompt_ids=prompt.token_ids,
            completion_ids=tuple(ids[:max_tokens]),
            rollout_logprobs=reply.logprobs if reply and reply.logprobs and own else None,
            source="teacher",
            policy_version=0,
            finish_reason=_finish_reason(reply, len(ids), max_tokens),
            tag=prompt.tag,
        )


def _finish_reason(
    reply: Reply | None, tokens: int, max_tokens: int
) -> Literal["stop", "length", "refused"]:
    if reply is None:
        return "refused"
    return "stop" if reply.ended and tokens <= max_tokens else "length"


class ApiScorer:
    """Scorer of completions by an endpoint, per token."""

    def start(self, config: EndpointTeacherConfig, key: str, vocabulary: int) -> None:
        """Create the client. The student has ``vocabulary`` tokens. The served model's distribution
        covers its own vocabulary, including padding."""
        self.client, self.vocabulary = EndpointClient(config, key), vocabulary
        self.top_k = config.top_k if config.scores == "top_k" else 0

    def score(self, rollouts: list[Rollout]) -> list[TeacherScore]:
        """Return one score per rollout, in order."""
        scored = self.client.score(
            [[*r.prompt_ids, *r.completion_ids] for r in rollouts], self.top_k
        )
        return [
            self._score(r, s) if s else TeacherScore(r.sample_id)
            for r, s in zip(rollouts, scored, strict=True)
        ]

    def usage(self) -> dict[str, int]:
        """Return the usage counts of the endpoint so far."""
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
                f"teacher.scores: the endpoint returned token {largest} among the most probable, "
                f"but student.model has only {self.vocabulary} tokens. Lower teacher.top_k, or set "
                "teacher.scores to logprobs."
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
