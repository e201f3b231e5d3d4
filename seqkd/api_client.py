"""A teacher behind an OpenAI-compatible endpoint, through the openai package, which keeps to
rate-limit headers and repeats failed requests with growing, jittered pauses."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from seqkd.config_roles import ApiTeacher
from seqkd.errors import ActorError, ModelError

UNREADABLE = (ValueError, TypeError, AttributeError, IndexError)
"""What reading an answer raises that is not one of this interface."""


@dataclass(frozen=True)
class Request:
    """One completion to ask for."""

    messages: tuple[tuple[str, str], ...]
    """(role, content), for the chat interface."""
    text: str
    """The rendered prompt, for the completions interface."""
    seed: int


@dataclass(frozen=True)
class Reply:
    """One completion."""

    text: str
    ended: bool
    """Whether the teacher stopped by itself; False at the token limit."""


def key_of(config: ApiTeacher) -> str:
    """The key from the environment. A server on this machine needs none; ModelError elsewhere."""
    key = os.environ.get(config.key_env, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ModelError(
            f"teacher.key_env: what {config.key_env} holds is no key: it has characters that an "
            "HTTP header cannot carry. Set it to the key alone."
        )
    if key:
        return key
    if urlsplit(config.base_url).hostname in ("127.0.0.1", "localhost", "::1"):
        return "none"
    raise ModelError(
        f"teacher.key_env: the environment variable {config.key_env} is not set. Set it to the key "
        f"of {config.base_url}, or name another variable."
    )


def check_endpoint(config: ApiTeacher) -> None:
    """ModelError unless the endpoint answers, takes the key and serves the model."""
    import openai

    key = key_of(config)
    client = openai.OpenAI(base_url=config.base_url, api_key=key, timeout=20, max_retries=3)
    try:
        served = [model.id for model in client.models.list()]
    except openai.NotFoundError:  # an endpoint need not list its models
        return
    except (*UNREADABLE, openai.OpenAIError) as error:
        raise ModelError(
            f"teacher.base_url: {config.base_url} does not list its models: {_cause(error, key)}. "
            f"Check the address (it mostly ends in /v1) and the key in {config.key_env}."
        ) from None
    if not any(name == config.model or name.endswith(f"/{config.model}") for name in served):
        raise ModelError(
            f"teacher.model: {config.model!r} is not served at {config.base_url}, which has "
            f"{', '.join(map(repr, served)) or 'none'}."
        )


class ApiClient:
    """Asks for completions, ``config.concurrency`` at a time, and counts what they cost."""

    def __init__(self, config: ApiTeacher, key: str) -> None:
        self.config, self.key = config, key
        self.used: Counter[str] = Counter()
        """requests, unreadable (answers, asked for again), prompt_tokens, completion_tokens."""

    def complete(
        self, requests: Sequence[Request], max_tokens: int, temperature: float, top_p: float
    ) -> list[Reply]:
        """A reply to each request, in order. ActorError where one has failed for good."""
        options = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p}
        return asyncio.run(self._all(requests, options))

    async def _all(self, requests: Sequence[Request], options: dict[str, Any]) -> list[Reply]:
        import openai

        limit = asyncio.Semaphore(self.config.concurrency)
        async with openai.AsyncOpenAI(
            base_url=self.config.base_url,
            api_key=self.key,
            timeout=self.config.timeout_s,
            max_retries=self.config.max_retries,
        ) as client:

            async def one(request: Request) -> Reply:
                async with limit:
                    return await self._reply(client, request, options)

            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(one(request)) for request in requests]
            except BaseExceptionGroup as failed:  # the first; the others were cancelled for it
                raise failed.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _reply(self, client: Any, request: Request, options: dict[str, Any]) -> Reply:
        import openai

        for attempt in range(self.config.max_retries + 1):
            self.used["requests"] += 1
            try:
                return self._read(await self._ask(client, request, options))
            except (*UNREADABLE, openai.APIResponseValidationError) as error:
                problem = error
                self.used["unreadable"] += 1
                await asyncio.sleep(min(8.0, 0.1 * 2**attempt))
            except openai.OpenAIError as error:  # the client has already repeated what it may
                raise ActorError(
                    f"teacher endpoint {self._where()}: {_cause(error, self.key)}"
                ) from None
        raise ActorError(
            f"teacher endpoint {self._where()}: its answers cannot be read: "
            f"{_cause(problem, self.key)}"
        )

    async def _ask(self, client: Any, request: Request, options: dict[str, Any]) -> Any:
        common = {"model": self.config.model, "seed": request.seed, **options}
        if self.config.api == "completions":
            return await client.completions.create(prompt=request.text, **common)
        messages = [{"role": role, "content": content} for role, content in request.messages]
        return await client.chat.completions.create(messages=messages, **common)

    def _read(self, answer: Any) -> Reply:
        if answer.usage is not None:
            self.used["prompt_tokens"] += answer.usage.prompt_tokens
            self.used["completion_tokens"] += answer.usage.completion_tokens
        (choice,) = answer.choices
        text = choice.text if self.config.api == "completions" else choice.message.content
        if not isinstance(text, str) or choice.finish_reason not in ("stop", "length"):
            raise ValueError(f"text {text!r:.40}, finish_reason {choice.finish_reason!r}")
        if not text and choice.finish_reason == "length":
            raise ValueError("no text, and cut")
        return Reply(text, choice.finish_reason == "stop")

    def _where(self) -> str:
        return f"{self.config.model!r} at {self.config.base_url}"


def _cause(error: BaseException, key: str) -> str:
    """One line, without the key; of a connection error, what the socket said."""
    inner = str(error.__cause__ or error).replace(key, "***")
    return f"{type(error).__name__}: {' '.join(inner.split()):.200}"
