"""A teacher behind an HTTP endpoint, at the place of an engine that samples."""

from __future__ import annotations

from typing import Any

from seqkd.api_client import ApiClient, Request
from seqkd.config_roles import ApiTeacher
from seqkd.models import load_tokenizer
from seqkd.types import Prompt, Rollout


class ApiSampler:
    """Asks an endpoint for completions and reads them as the student's tokens."""

    def __init__(self, stop_ids: tuple[int, ...]) -> None:
        self.stop_ids = stop_ids

    def start(self, config: ApiTeacher, key: str, tokenizer_from: str) -> None:
        """Load the student's tokenizer. Apart from the constructor, so that a failure keeps its
        cause; ``key`` comes from the driver's environment."""
        self.client = ApiClient(config, key)
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
    ) -> list[Rollout]:
        """``samples[i]`` completions of prompt i; ``seeds[i]`` is passed on, and means what the
        endpoint makes of it."""
        asked = [
            (prompt, seed + index)
            for prompt, seed, number in zip(prompts, seeds, samples, strict=True)
            for index in range(number)
        ]
        requests = [
            Request(prompt.messages, self.tokenizer.decode(prompt.token_ids), seed)
            for prompt, seed in asked
        ]
        replies = self.client.complete(requests, max_tokens, temperature, top_p)
        return [
            self._rollout(prompt, seed, reply.text, reply.ended, max_tokens)
            for (prompt, seed), reply in zip(asked, replies, strict=True)
        ]

    def usage(self) -> dict[str, int]:
        """What the endpoint was asked for so far."""
        return dict(self.client.used)

    def _rollout(
        self, prompt: Prompt, seed: int, text: str, ended: bool, max_tokens: int
    ) -> Rollout:
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        # A completion that was cut has no end: to give it one would teach to stop mid-sentence.
        ids = [*ids, self.eos_id] if ended else ids
        return Rollout(
            prompt_id=prompt.prompt_id,
            sample_id=f"{prompt.prompt_id}/teacher/{seed:08x}",
            prompt_ids=prompt.token_ids,
            completion_ids=tuple(ids[:max_tokens]),
            rollout_logprobs=None,
            source="teacher",
            policy_version=0,
            finish_reason="stop" if ended and len(ids) <= max_tokens else "length",
        )
