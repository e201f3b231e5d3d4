"""A teacher behind an OpenAI-compatible endpoint, through the openai package, which keeps to
rate-limit headers and repeats failed requests with growing, jittered pauses."""

from __future__ import annotations

import asyncio
import math
import os
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

from seqkd.config.teacher import EndpointTeacherConfig
from seqkd.errors import ActorError, ModelError

T = TypeVar("T")

ROUNDING = 1e-5
"""How far above 0 rounding may put the log-prob of a certain token."""
LOWEST = -9999.0
"""What vLLM's server writes for minus infinity, which JSON does not have."""
BY_ID = {"return_tokens_as_token_ids": True}
"""vLLM's option: a token comes back as "token_id:17", since its text may be that of another."""
NEUTRAL = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
"""vLLM's options that a served checkpoint's own defaults would otherwise set."""


class Unreadable(ValueError):
    """An answer that lacks what was asked for; asked for again."""


UNREADABLE = (ValueError, TypeError, AttributeError, IndexError)
"""What reading an answer raises that is not one of this interface."""


@dataclass(frozen=True)
class Request:
    """One completion to ask for."""

    messages: tuple[tuple[str, str], ...]
    """(role, content), for the chat interface."""
    prompt: str | tuple[int, ...]
    """For the completions interface. To token ids, the completion comes as token ids too."""
    seed: int


@dataclass(frozen=True)
class Reply:
    """One completion."""

    text: str
    ended: bool
    """Whether the teacher stopped by itself; False at the token limit."""
    token_ids: tuple[int, ...] = ()
    """With the token that ended it; empty unless the prompt was token ids."""
    logprobs: tuple[float, ...] = ()
    """Of ``token_ids``, as the endpoint gives them: of its model at temperature 1."""


@dataclass(frozen=True)
class Scored:
    """What the model thinks of a sequence of S tokens, at the states before tokens 1 to S - 1."""

    logprobs: list[float]
    """[S - 1] of the token that follows."""
    top: list[list[tuple[int, float]]]
    """[S - 1][k] token and log-prob, the most probable first; k may be 0."""


@dataclass(frozen=True)
class _Call(Generic[T]):
    api: str
    body: dict[str, Any]
    read: Callable[[Any], T]


def key_of(config: EndpointTeacherConfig) -> str:
    """The key from the environment. A server on this machine needs none; ModelError elsewhere."""
    key = os.environ.get(config.api_key_env, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ModelError(
            f"teacher.api_key_env: what {config.api_key_env} holds is no key: it has characters "
            "that an HTTP header cannot carry. Set it to the key alone."
        )
    if key:
        return key
    if urlsplit(config.base_url).hostname in ("127.0.0.1", "localhost", "::1"):
        return "not-needed"  # the openai package wants one
    raise ModelError(
        f"teacher.api_key_env: the environment variable {config.api_key_env} is not set. Set it "
        f"to the key of {config.base_url}, or name another variable."
    )


def same_model(served: str, asked: str) -> bool:
    """Whether two names mean one model; some endpoints put an owner before it."""
    return served == asked or served.endswith(f"/{asked}")


class EndpointClient:
    """Asks an endpoint, ``config.concurrency`` requests at a time, and counts what they cost.

    Everything it returns is in order and whole: an answer that cannot be read is asked for again,
    and ActorError is raised where one has failed for good."""

    def __init__(self, config: EndpointTeacherConfig, key: str) -> None:
        self.config, self.key = config, key
        self.used: Counter[str] = Counter()
        """requests, unreadable (answers, asked for again), prompt_tokens, completion_tokens."""

    def complete(
        self,
        requests: Sequence[Request],
        max_tokens: int,
        temperature: float,
        top_p: float,
        stop_ids: Sequence[int] = (),
    ) -> list[Reply]:
        """A completion for each request; ``stop_ids`` end those that come as token ids."""
        options = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p}
        return self._run([self._completion(r, options, stop_ids) for r in requests])

    def prompt_tokens(self, requests: Sequence[Request]) -> list[int]:
        """How many tokens of each prompt the model read."""
        calls = [self._completion(request, {"max_tokens": 1}, ()) for request in requests]
        return self._run([_Call(call.api, call.body, _read_prompt_tokens) for call in calls])

    def score(self, sequences: Sequence[Sequence[int]], top_k: int) -> list[Scored]:
        """Log-probs of each sequence of token ids, through the completions interface."""

        def call(ids: Sequence[int]) -> _Call[Scored]:
            # One log-prob even where none but the token's own is wanted: 0 means none to some.
            body = {"prompt": list(ids), "echo": True, "logprobs": max(1, top_k), "max_tokens": 1}
            body |= {"temperature": 1.0, "extra_body": BY_ID}
            return _Call("completions", body, lambda answer: _read_scores(answer, ids, top_k))

        return self._run([call(ids) for ids in sequences])

    def _completion(
        self, request: Request, options: dict[str, Any], stop_ids: Sequence[int]
    ) -> _Call[Reply]:
        body: dict[str, Any] = {"seed": request.seed, **options}
        if self.config.api == "chat":
            body["messages"] = [{"role": r, "content": c} for r, c in request.messages]
            return _Call("chat", body, _read_chat)
        prompt = request.prompt
        if isinstance(prompt, str):
            return _Call("completions", body | {"prompt": prompt}, _read_text)
        stop = {"ignore_eos": True, "stop_token_ids": list(stop_ids)}
        body |= {"prompt": list(prompt), "logprobs": 1, "extra_body": BY_ID | NEUTRAL | stop}
        return _Call("completions", body, lambda a: _read_tokens(a, len(prompt), stop_ids))

    def _run(self, calls: Sequence[_Call[T]]) -> list[T]:
        return asyncio.run(self._all(calls))

    async def _all(self, calls: Sequence[_Call[T]]) -> list[T]:
        import openai

        limit = asyncio.Semaphore(self.config.concurrency)
        async with openai.AsyncOpenAI(
            base_url=self.config.base_url,
            api_key=self.key,
            timeout=self.config.timeout_s,
            max_retries=self.config.max_retries,
        ) as client:

            async def one(call: _Call[T]) -> T:
                async with limit:
                    return await self._answer(client, call)

            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(one(call)) for call in calls]
            except BaseExceptionGroup as failed:  # the first; the others were cancelled for it
                raise failed.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _answer(self, client: Any, call: _Call[T]) -> T:
        import openai

        interface = client.chat.completions if call.api == "chat" else client.completions
        for attempt in range(self.config.max_retries + 1):
            self.used["requests"] += 1
            try:
                answer = await interface.create(model=self.config.model, **call.body)
                self._account(answer)
                return call.read(answer)
            except (*UNREADABLE, openai.APIResponseValidationError) as error:
                problem = error
                self.used["unreadable"] += 1
                await asyncio.sleep(min(8.0, 0.1 * 2**attempt) * random.uniform(0.5, 1))
            except openai.OpenAIError as error:  # the client has already repeated what it may
                raise ActorError(
                    f"teacher endpoint {self._where()}: {cause(error, self.key)}"
                ) from None
        raise ActorError(
            f"teacher endpoint {self._where()}: its answers cannot be read: "
            f"{cause(problem, self.key)}"
        )

    def _account(self, answer: Any) -> None:
        """Count what the answer cost; ModelError where another model gave it."""
        if answer.usage is not None:
            self.used["prompt_tokens"] += answer.usage.prompt_tokens
            self.used["completion_tokens"] += answer.usage.completion_tokens
        if answer.model and not same_model(answer.model, self.config.model):
            raise ModelError(
                f"teacher.model: {self.config.model!r} was asked for, but {answer.model!r} answers "
                f"at {self.config.base_url}. Set teacher.model to it if that is the one you mean."
            )

    def _where(self) -> str:
        return f"{self.config.model!r} at {self.config.base_url}"


def _read_chat(answer: Any) -> Reply:
    (choice,) = answer.choices
    return _reply(choice.message.content, choice.finish_reason)


def _read_text(answer: Any) -> Reply:
    (choice,) = answer.choices
    return _reply(choice.text, choice.finish_reason)


def _reply(text: Any, reason: Any) -> Reply:
    if not isinstance(text, str) or reason not in ("stop", "length"):
        raise Unreadable(f"text {text!r:.40}, finish_reason {reason!r}")
    if not text and reason == "length":
        raise Unreadable("no text, and cut")
    return Reply(text, reason == "stop")


def _read_tokens(answer: Any, prompt: int, stop_ids: Sequence[int]) -> Reply:
    ids, logprobs, _ = _read_logprobs(answer, prompt)
    (choice,) = answer.choices
    ended = choice.finish_reason == "stop"
    if choice.finish_reason not in ("stop", "length") or ended != (ids[-1] in stop_ids):
        raise Unreadable(f"finish_reason {choice.finish_reason!r} at token {ids[-1]}")
    return Reply(choice.text, ended, tuple(ids), tuple(map(_logprob, logprobs)))


def _read_prompt_tokens(answer: Any) -> int:
    if answer.usage is None or not isinstance(answer.usage.prompt_tokens, int):
        raise Unreadable(
            "it does not say how many prompt tokens it read, so that nobody could see it truncate "
            "them. Use a server that reports usage."
        )
    return answer.usage.prompt_tokens


def _read_scores(answer: Any, ids: Sequence[int], top_k: int) -> Scored:
    size = len(ids)
    echoed, logprobs, top = _read_logprobs(answer, size)
    if echoed[:size] != list(ids):
        raise Unreadable(
            f"it scored {len(echoed)} tokens that do not begin with the {size} sent. Use a server "
            "that echoes a prompt of token ids as it is, or set teacher.scores to none."
        )
    values = list(map(_logprob, logprobs[1:size]))
    if len(values) < size - 1 or not any(values):
        what = "every log-prob is 0" if values else "it has no log-probs"
        raise Unreadable(f"{what}, for {size} tokens. Set teacher.scores to none.")
    return Scored(values, [_top(entries, top_k) for entries in top[1:size]] if top_k else [])


def _read_logprobs(answer: Any, prompt: int) -> tuple[list[int], list[Any], list[Any]]:
    """Token ids, their log-probs and the most probable tokens, as they came."""
    (choice,) = answer.choices
    read = answer.usage.prompt_tokens if answer.usage else prompt
    if read != prompt:
        raise Unreadable(
            f"it read {read} of {prompt} prompt tokens. Raise the context of the server, or lower "
            "data.max_prompt_tokens."
        )
    logprobs = choice.logprobs
    if logprobs is None or not logprobs.token_logprobs or not logprobs.tokens:
        raise Unreadable(
            "it gives no log-probs. Use a server that does (vLLM: echo with logprobs), or set "
            "teacher.scores to none."
        )
    lists = (logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs or ())
    if len(set(map(len, lists))) > 1:
        raise Unreadable(
            f"it gives {len(logprobs.tokens)} tokens, {len(logprobs.token_logprobs)} log-probs and "
            f"{len(logprobs.top_logprobs or ())} lists of the most probable tokens. Set "
            "teacher.scores to none."
        )
    return [_token(t) for t in logprobs.tokens], logprobs.token_logprobs, logprobs.top_logprobs


def _token(text: str) -> int:
    name, _, number = text.partition(":")
    if name != "token_id" or not number.isdigit():
        raise Unreadable(
            f"it names tokens by text ({text!r:.20}), which can be that of several. Use a server "
            "with return_tokens_as_token_ids (vLLM), or set teacher.scores to none."
        )
    return int(number)


def _logprob(value: Any) -> float:
    if not isinstance(value, (int, float)) or not LOWEST < value <= ROUNDING:
        raise Unreadable(f"a log-prob is {value!r:.20}. Set teacher.scores to none.")
    return float(value)


def _top(entries: dict[str, Any], top_k: int) -> list[tuple[int, float]]:
    """The ``top_k`` most probable; the token itself may have been added to them."""
    pairs = [(_token(text), _logprob(value)) for text, value in entries.items()]
    pairs = sorted(pairs, key=lambda pair: -pair[1])[:top_k]
    if len(pairs) < top_k:
        raise Unreadable(
            f"it names {len(pairs)} tokens at a state, fewer than teacher.top_k = {top_k}. Lower "
            "that, or raise the limit of the server (vLLM: --max-logprobs)."
        )
    total = math.fsum(math.exp(value) for _, value in pairs)
    if total > 1.001:
        raise Unreadable(
            f"the most probable tokens have probabilities that sum to {total:.4g}. Set "
            "teacher.scores to none."
        )
    return pairs


def cause(error: BaseException, key: str) -> str:
    """One line, without the key; of a connection error, what the socket said."""
    inner = " ".join(str(error.__cause__ or error).replace(key, "***").split())
    return inner if isinstance(error, Unreadable) else f"{type(error).__name__}: {inner:.200}"
