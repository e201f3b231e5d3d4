"""Client of a teacher behind an OpenAI-compatible endpoint. It uses the openai package, which
respects rate-limit headers and retries failed requests with jittered exponential backoff."""

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
from seqkd.errors import ActorError, ModelError, SeqkdError

T = TypeVar("T")

ROUNDING = 1e-5
"""Largest log-prob above 0 that is accepted as a rounding error."""
LOWEST = -9999.0
"""Value that vLLM's server writes for minus infinity, which JSON does not have."""
BY_ID = {"return_tokens_as_token_ids": True}
"""vLLM's option to return tokens as "token_id:17", since several tokens may have the same text."""
LARGEST = 2**27
"""Largest response in bytes. The scores of 32,768 tokens with top_k 64 have about 2**26."""
LEAST = 20
"""Number of requests before ``max_skipped_share`` applies."""
NEUTRAL = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
"""vLLM's options that would otherwise take the defaults of the served checkpoint."""


class Unreadable(ValueError):
    """Invalid response; the request is repeated."""


class Refused(Unreadable):
    """Response without an answer, because the endpoint refused to give one."""

    def __init__(self, why: str) -> None:
        super().__init__(
            f"the endpoint refused to answer ({why}). Remove the prompt, or set teacher.on_refusal "
            "to skip."
        )


UNREADABLE = (ValueError, TypeError, AttributeError, IndexError)
"""Exceptions of parsing a response that does not follow the interface."""


@dataclass(frozen=True)
class Request:
    """Request for one completion."""

    messages: tuple[tuple[str, str], ...]
    """(role, content) pairs for the chat API."""
    prompt: str | tuple[int, ...]
    """Prompt for the completions API. Given as token ids, the completion has token ids too."""
    seed: int


@dataclass(frozen=True)
class Reply:
    """One completion."""

    text: str
    ended: bool
    """True if the teacher ended the completion; False if it was cut at the token limit."""
    token_ids: tuple[int, ...] = ()
    """Tokens, including the end-of-sequence token; empty unless the prompt was token ids."""
    logprobs: tuple[float, ...] = ()
    """Log-probs of ``token_ids`` as returned by the endpoint: of its model at temperature 1."""


@dataclass(frozen=True)
class Scored:
    """Log-probs for a sequence of S tokens, at the states before tokens 1 to S - 1."""

    logprobs: list[float]
    """[S - 1] log-prob of the next token."""
    top: list[list[tuple[int, float]]]
    """[S - 1][k] token and log-prob, most probable first; k may be 0."""


@dataclass(frozen=True)
class _Call(Generic[T]):
    api: str
    body: dict[str, Any]
    read: Callable[[Any], T]


def key_of(config: EndpointTeacherConfig) -> str:
    """Return the key from the environment. Raises ModelError if it is missing, except for a server
    on this machine, or invalid."""
    key = os.environ.get(config.api_key_env, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ModelError(
            f"teacher.api_key_env: the value of {config.api_key_env} has characters that are not "
            "allowed in an HTTP header. Set it to the key only."
        )
    if key:
        return key
    if urlsplit(config.base_url).hostname in ("127.0.0.1", "localhost", "::1"):
        return "not-needed"  # the openai package requires a key
    raise ModelError(
        f"teacher.api_key_env: the environment variable {config.api_key_env} is not set. Set it "
        f"to the key for {config.base_url}, or configure another variable."
    )


def same_model(served: str, asked: str) -> bool:
    """Return whether two names refer to the same model; some endpoints prepend an owner."""
    return served == asked or served.endswith(f"/{asked}")


class EndpointClient:
    """Client that sends up to ``config.concurrency`` requests at a time and counts their usage.

    Results are in the order of the requests. Invalid and refused responses are requested again,
    and then skipped: their result is None. Raises ActorError if a request fails permanently.
    Raises ModelError if another model responds, if the endpoint redirects to another address, or
    if more is skipped than the configuration allows."""

    def __init__(self, config: EndpointTeacherConfig, key: str) -> None:
        self.config, self.key = config, key
        self.used: Counter[str] = Counter()
        """Counts of requests, unreadable (invalid responses), refused (refused responses), skipped
        (requests without an answer after all retries), prompt_tokens and completion_tokens."""
        self.ended = 0
        """Number of requests with an answer or skipped."""

    def complete(
        self,
        requests: Sequence[Request],
        max_tokens: int,
        temperature: float,
        top_p: float,
        stop_ids: Sequence[int] = (),
    ) -> list[Reply | None]:
        """Return a completion for each request. ``stop_ids`` end completions of token-id
        prompts."""
        options = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p}
        return self._run([self._completion(r, options, stop_ids) for r in requests])

    def prompt_tokens(self, requests: Sequence[Request]) -> list[int]:
        """Return the number of prompt tokens that the model read for each request."""
        calls = [self._completion(request, {"max_tokens": 1}, ()) for request in requests]
        read = self._run([_Call(call.api, call.body, _read_prompt_tokens) for call in calls])
        return [tokens for tokens in read if tokens is not None]

    def score(self, sequences: Sequence[Sequence[int]], top_k: int) -> list[Scored | None]:
        """Return log-probs of each sequence of token ids, through the completions API."""

        def call(ids: Sequence[int]) -> _Call[Scored]:
            # Some servers return no log-probs at all for logprobs=0, so at least 1 is requested.
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

    def _run(self, calls: Sequence[_Call[T]]) -> list[T | None]:
        return asyncio.run(self._all(calls))

    async def _all(self, calls: Sequence[_Call[T]]) -> list[T | None]:
        import openai

        limit = asyncio.Semaphore(self.config.concurrency)
        async with openai.AsyncOpenAI(
            base_url=self.config.base_url,
            api_key=self.key,
            timeout=self.config.timeout_s,
            max_retries=self.config.max_retries,
            http_client=bounded_client(self.config.timeout_s),
        ) as client:

            async def one(call: _Call[T]) -> T | None:
                async with limit:
                    return await self._answer(client, call)

            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(one(call)) for call in calls]
            except BaseExceptionGroup as failed:
                raise failed.exceptions[0] from None  # the first error cancelled the other tasks
        return [task.result() for task in tasks]

    async def _answer(self, client: Any, call: _Call[T]) -> T | None:
        import openai

        interface = client.chat.completions if call.api == "chat" else client.completions
        for attempt in range(self.config.answer_retries + 1):
            self.used["requests"] += 1
            try:
                answer = await interface.create(model=self.config.model, **call.body)
                self._account(answer)
                result = call.read(answer)
                self.ended += 1
                return result
            except (*UNREADABLE, openai.APIResponseValidationError) as error:
                problem: Exception = error
            except openai.OpenAIError as error:  # the client has already used up its retries
                if not is_filtered(error):
                    raise self._failed(error) from None
                problem = Refused("content filter")
            if isinstance(problem, Refused):
                self.used["refused"] += 1
            else:
                self.used["unreadable"] += 1
            await asyncio.sleep(min(8.0, 0.1 * 2**attempt) * random.uniform(0.5, 1))
        self._skip(problem)
        return None

    def _failed(self, error: Exception) -> SeqkdError:
        if target := redirection(error):
            return redirected(self.config.base_url, target)
        return ActorError(f"teacher endpoint {self._where()}: {cause(error, self.key)}")

    def _skip(self, problem: Exception) -> None:
        """Count a request without an answer. Raises ModelError if it must not be skipped."""
        self.ended += 1
        self.used["skipped"] += 1
        skipped, allowed = self.used["skipped"], self.config.max_skipped_share
        text = f"teacher endpoint {self._where()}: invalid response: {cause(problem, self.key)}"
        if self.config.on_refusal == "fail":
            raise ModelError(text)
        if self.ended >= LEAST and skipped > allowed * self.ended:
            raise ModelError(
                f"teacher.max_skipped_share: {skipped} of {self.ended} requests had no valid "
                f"answer, more than the share of {allowed:g} that may be skipped. The last cause: "
                f"{text}"
            )

    def _account(self, answer: Any) -> None:
        """Count the tokens of a response. Raises ModelError if another model responded."""
        if answer.usage is not None:
            self.used["prompt_tokens"] += answer.usage.prompt_tokens
            self.used["completion_tokens"] += answer.usage.completion_tokens
        if answer.model and not same_model(answer.model, self.config.model):
            raise ModelError(
                f"teacher.model: {self.config.model!r} was requested, but {self.config.base_url} "
                f"serves {answer.model!r}. Set teacher.model to the served model, or change "
                "teacher.base_url."
            )

    def _where(self) -> str:
        return f"{self.config.model!r} at {self.config.base_url}"


def bounded_client(seconds: float) -> Any:
    """Return an HTTP client whose responses are complete within ``seconds`` and have at most
    :data:`LARGEST` bytes. It follows no redirects, because the prompts and the key are only for the
    configured address."""
    import httpx2
    import openai

    class Bounded(openai.DefaultAsyncHttpxClient):
        async def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
            body = bytearray()
            try:
                async with asyncio.timeout(seconds):
                    response = await super().send(request, **options | {"stream": True})
                    async for part in response.aiter_bytes():
                        body += part
                        if len(body) > LARGEST:
                            await response.aclose()
                            raise httpx2.ReadError(f"the response has more than {LARGEST} bytes")
            except TimeoutError:
                raise httpx2.ReadTimeout(f"no complete response within {seconds:g} s") from None
            decoded = ("content-encoding", "content-length", "transfer-encoding")
            kept = [(k, v) for k, v in response.headers.items() if k not in decoded]
            status = response.status_code
            return httpx2.Response(status, headers=kept, content=bytes(body), request=request)

    return Bounded(follow_redirects=False)


def is_filtered(error: Exception) -> bool:
    """Return True if an HTTP error is a refusal by a content filter."""
    return getattr(error, "code", None) in ("content_filter", "content_policy_violation")


def redirection(error: Exception) -> str:
    """Return the target if an HTTP error is a redirect, otherwise an empty string."""
    response = getattr(error, "response", None)
    return str(response.headers.get("location", "")) if response is not None else ""


def redirected(base_url: str, target: str) -> ModelError:
    """Return the error for a redirect."""
    return ModelError(
        f"teacher.base_url: {base_url} redirects to {target:.200}. Redirects are not followed, "
        "because the prompts and the key would be sent there. If you trust that address, set "
        "teacher.base_url to it."
    )


def _read_chat(answer: Any) -> Reply:
    (choice,) = answer.choices
    if refusal := getattr(choice.message, "refusal", None):
        raise Refused(f"{refusal!s:.80}")
    return _reply(choice.message.content, choice.finish_reason)


def _read_text(answer: Any) -> Reply:
    (choice,) = answer.choices
    return _reply(choice.text, choice.finish_reason)


def _reply(text: Any, reason: Any) -> Reply:
    if reason == "content_filter":
        raise Refused("content filter")
    if not isinstance(text, str) or reason not in ("stop", "length"):
        raise Unreadable(f"text {text!r:.40}, finish_reason {reason!r}")
    if not text and reason == "length":
        raise Unreadable("empty text with finish_reason 'length'")
    if any(0xD800 <= ord(character) < 0xE000 for character in text):
        raise Unreadable("the text has a lone surrogate, so it is not valid Unicode")
    return Reply(text, reason == "stop")


def _read_tokens(answer: Any, prompt: int, stop_ids: Sequence[int]) -> Reply:
    ids, logprobs, _ = _read_logprobs(answer, prompt)
    (choice,) = answer.choices
    if choice.finish_reason == "content_filter":
        raise Refused("content filter")
    ended = choice.finish_reason == "stop"
    if choice.finish_reason not in ("stop", "length") or ended != (ids[-1] in stop_ids):
        raise Unreadable(f"finish_reason {choice.finish_reason!r} at token {ids[-1]}")
    return Reply(choice.text, ended, tuple(ids), tuple(map(_logprob, logprobs)))


def _read_prompt_tokens(answer: Any) -> int:
    if answer.usage is None or not isinstance(answer.usage.prompt_tokens, int):
        raise Unreadable(
            "it does not report the number of prompt tokens, so truncated prompts could not be "
            "detected. Use a server that reports usage."
        )
    return answer.usage.prompt_tokens


def _read_scores(answer: Any, ids: Sequence[int], top_k: int) -> Scored:
    size = len(ids)
    echoed, logprobs, top = _read_logprobs(answer, size)
    if echoed[:size] != list(ids):
        raise Unreadable(
            f"it scored {len(echoed)} tokens that do not begin with the {size} sent. Use a server "
            "that echoes prompts of token ids unchanged, or set teacher.scores to none."
        )
    values = list(map(_logprob, logprobs[1:size]))
    if len(values) < size - 1 or not any(values):
        what = "every log-prob is 0" if values else "there are no log-probs"
        raise Unreadable(f"{what} for {size} tokens. Set teacher.scores to none.")
    return Scored(values, [_top(entries, top_k) for entries in top[1:size]] if top_k else [])


def _read_logprobs(answer: Any, prompt: int) -> tuple[list[int], list[Any], list[Any]]:
    """Return token ids, their log-probs and the most probable tokens, unconverted."""
    (choice,) = answer.choices
    read = answer.usage.prompt_tokens if answer.usage else prompt
    if read != prompt:
        raise Unreadable(
            f"it read {read} of {prompt} prompt tokens. Increase the server's context length, or "
            "decrease data.max_prompt_tokens."
        )
    logprobs = choice.logprobs
    if logprobs is None or not logprobs.token_logprobs or not logprobs.tokens:
        raise Unreadable(
            "it returns no log-probs. Use a server that returns them (vLLM: echo with logprobs), "
            "or set teacher.scores to none."
        )
    lists = (logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs or ())
    if len(set(map(len, lists))) > 1:
        raise Unreadable(
            f"it returns {len(logprobs.tokens)} tokens, {len(logprobs.token_logprobs)} log-probs "
            f"and {len(logprobs.top_logprobs or ())} lists of the most probable tokens. Set "
            "teacher.scores to none."
        )
    return [_token(t) for t in logprobs.tokens], logprobs.token_logprobs, logprobs.top_logprobs


def _token(text: str) -> int:
    name, _, number = text.partition(":")
    if name != "token_id" or not number.isdigit():
        raise Unreadable(
            f"it returns tokens as text ({text!r:.20}), which is ambiguous. Use a server with "
            "return_tokens_as_token_ids (vLLM), or set teacher.scores to none."
        )
    return int(number)


def _logprob(value: Any) -> float:
    if not isinstance(value, (int, float)) or not LOWEST < value <= ROUNDING:
        raise Unreadable(f"a log-prob is {value!r:.20}. Set teacher.scores to none.")
    return float(value)


def _top(entries: dict[str, Any], top_k: int) -> list[tuple[int, float]]:
    """Return the ``top_k`` most probable tokens; servers may add the sampled token."""
    pairs = [(_token(text), _logprob(value)) for text, value in entries.items()]
    pairs = sorted(pairs, key=lambda pair: -pair[1])[:top_k]
    if len(pairs) < top_k:
        raise Unreadable(
            f"it returns {len(pairs)} tokens per state, fewer than teacher.top_k = {top_k}. "
            "Decrease teacher.top_k, or increase the server's limit (vLLM: --max-logprobs)."
        )
    total = math.fsum(math.exp(value) for _, value in pairs)
    if total > 1.001:
        raise Unreadable(
            f"the probabilities of the most probable tokens sum to {total:.4g}. Set "
            "teacher.scores to none."
        )
    return pairs


def cause(error: BaseException, key: str) -> str:
    """Describe an error in one line without the key; a connection error by its socket error."""
    inner = " ".join(str(error.__cause__ or error).replace(key, "***").split())
    return inner if isinstance(error, Unreadable) else f"{type(error).__name__}: {inner:.200}"
