"""Checks of a teacher's endpoint before the first step, by a few requests."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from seqkd.config.data import DataConfig
from seqkd.config.rollout import RolloutConfig
from seqkd.config.teacher import EndpointTeacherConfig
from seqkd.errors import ModelError
from seqkd.teachers.endpoint import (
    UNREADABLE,
    EndpointClient,
    Request,
    cause,
    key_of,
    redirected,
    redirection,
    same_model,
)

TEXT = (
    "Water boils at a lower temperature on a mountain, because the air there presses less. In 1648 "
    "Florin Périer carried a barometer up the Puy de Dôme and saw its mercury fall by 8 cm; his "
    "brother-in-law, Blaise Pascal, had asked him to. What would you expect on the Moon? "
)
TOLERANCE = {"float32": (1e-3, 0.01), "bfloat16": (0.05, 0.5)}
"""Limits in nats, by precision. The first is the mean difference between two scores of one text
(rounding depends on the batch). The second is the largest difference from the checkpoint on another
engine."""
UNIFORM = 0.1
"""Nats. If every log-prob is closer than this to -ln V, the model is untrained."""
COMPARED_TOKENS = 64


def check_endpoint(config: EndpointTeacherConfig) -> EndpointClient:
    """Return a client for the other checks. Raises ModelError unless the endpoint answers, accepts
    the key and serves the model."""
    import openai

    key = key_of(config)
    # Errors found here are rarely transient, so fewer retries than in the run are enough.
    retries = {"max_retries": min(config.max_retries, 5), "on_refusal": "fail"}
    patient = config.model_copy(update=retries)
    http = openai.DefaultHttpxClient(follow_redirects=False)
    client = openai.OpenAI(
        base_url=config.base_url, api_key=key, timeout=20, max_retries=3, http_client=http
    )
    try:
        served = _served(client)
    except openai.NotFoundError:  # listing models is optional
        return EndpointClient(patient, key)
    except (*UNREADABLE, openai.OpenAIError) as error:
        if target := redirection(error):
            raise redirected(config.base_url, target) from None
        raise ModelError(
            f"teacher.base_url: {config.base_url} does not list its models: {cause(error, key)}. "
            f"Check the address (it usually ends in /v1) and the key in {config.api_key_env}."
        ) from None
    if not any(same_model(name, config.model) for name in served):
        raise ModelError(
            f"teacher.model: {config.model!r} is not served at {config.base_url}. Models served "
            f"there: {', '.join(map(repr, served)) or 'none'}."
        )
    return EndpointClient(patient, key)


def _served(client: Any) -> list[str]:
    """Return the names of the served models. The request is repeated if the answer is not valid
    JSON, for example because it is truncated."""
    for _ in range(3):
        with suppress(json.JSONDecodeError):
            return [model.id for model in client.models.list()]
    return [model.id for model in client.models.list()]


def check_answers(
    client: EndpointClient,
    tokenizer: Any,
    vocabulary: int,
    data: DataConfig,
    rollout: RolloutConfig,
) -> None:
    """Check the endpoint's answers to at most six requests, each of at most one prompt and one
    completion.

    Raises ModelError (or ActorError, from the client) if prompts are truncated or another model
    answers. If the teacher scores, also if scores are missing, not reproducible, near-uniform over
    ``vocabulary`` tokens, or different from those of ``teacher.checkpoint``.
    """
    teacher, longest = client.config, data.max_prompt_tokens
    if teacher.by_text:
        _reads_all_text(client, tokenizer, longest)
    if teacher.scores == "none":
        return
    # The longest text that the run may score, with a first token that can be changed.
    ids = _tokens(tokenizer, longest + rollout.max_tokens)
    changed = [ids[1], *ids[1:]]
    top_k = teacher.top_k if teacher.scores == "top_k" else 0
    first, second, third = (s.logprobs for s in client.score([ids, ids, changed], top_k) if s)
    _repeats(teacher, first, second)
    half = len(first) // 2
    if half and first[half:] == third[half:]:
        raise ModelError(
            f"teacher.base_url: {teacher.base_url} truncates prompts: changing the first of "
            f"{len(ids)} tokens changes no log-prob in the second half. Raise the context length "
            "of the server, or lower data.max_prompt_tokens."
        )
    if all(abs(value + math.log(vocabulary)) < UNIFORM for value in first):
        raise ModelError(
            f"teacher.model: every log-prob of {teacher.model!r} at {teacher.base_url} is within "
            f"{UNIFORM} of -ln {vocabulary} = {-math.log(vocabulary):.4g}, as of a model without "
            "its weights. Restart the server with the checkpoint."
        )
    if teacher.checkpoint is not None:
        _is_the_checkpoint(teacher, ids[:COMPARED_TOKENS], first)


def _tokens(tokenizer: Any, length: int) -> list[int]:
    piece: list[int] = tokenizer(TEXT, add_special_tokens=False).input_ids
    return (piece * -(-length // len(piece)))[:length]


def _reads_all_text(client: EndpointClient, tokenizer: Any, longest: int) -> None:
    """Raise ModelError if the endpoint truncates prompts.

    The endpoint counts the tokens of a minimal text, of a text, and of the text repeated. Repeating
    the text must add as many tokens as the text has. The teacher's own tokenizer does the counting,
    and the tokens that its template adds cancel out.
    """

    def requests(*texts: str) -> list[Request]:
        return [Request((("user", text),), text, seed=0) for text in texts]

    (empty,) = client.prompt_tokens(requests("a"))
    size = (longest - empty) // 2
    if size < 8:  # too short: the template's own tokens would blur the counts
        return
    text = tokenizer.decode(_tokens(tokenizer, size))
    once, twice = client.prompt_tokens(requests(text, text + text))
    # Joining the texts may save one token. The factor allows for longer tokens of the teacher.
    if twice - once < max(1, 0.8 * (once - empty) - 1):
        raise ModelError(
            f"teacher.base_url: {client.config.base_url} truncates prompts: it counted {once} "
            f"tokens in a prompt and {twice} in a prompt twice as long. Raise the context length "
            f"of the server, or lower data.max_prompt_tokens = {longest}."
        )


def _repeats(
    teacher: EndpointTeacherConfig, first: Sequence[float], second: Sequence[float]
) -> None:
    differences = [abs(a - b) for a, b in zip(first, second, strict=True)]
    mean, tolerance = sum(differences) / len(differences), TOLERANCE[teacher.precision][0]
    if mean > tolerance:
        raise ModelError(
            f"teacher.base_url: {teacher.base_url} is not deterministic: two scores of one text "
            f"differ by {mean:.3g} nats per token on average ({max(differences):.3g} at most). The "
            f"limit is {tolerance} for teacher.precision {teacher.precision!r}. Use a single "
            "server with one model and deterministic computation."
        )


def _is_the_checkpoint(teacher: EndpointTeacherConfig, ids: list[int], served: list[float]) -> None:
    import torch

    from seqkd.learner.student import last_hidden
    from seqkd.models.loading import load_causal_lm
    from seqkd.models.model_files import load_complete
    from seqkd.models.output_head import head_of

    assert teacher.checkpoint is not None
    load_complete(teacher.checkpoint, "teacher.checkpoint")
    model = load_causal_lm(teacher.checkpoint, teacher.precision, "teacher.checkpoint")
    tokens = torch.tensor([ids])
    with torch.inference_mode():
        states = last_hidden(model, tokens, torch.ones_like(tokens))[0, :-1]
        expected, _, _ = head_of(model).logprobs(states, tokens[0, 1:])
    gap = (expected - torch.tensor(served[: len(expected)])).abs().max().item()
    tolerance = TOLERANCE[teacher.precision][1]
    if not gap <= tolerance:
        raise ModelError(
            f"teacher.checkpoint: {teacher.model!r} at {teacher.base_url} is not "
            f"{teacher.checkpoint!r}: the log-probs of a short text differ by up to {gap:.3g} nats "
            f"(limit {tolerance} for teacher.precision {teacher.precision!r}). Serve that "
            "checkpoint, or correct teacher.checkpoint or teacher.precision."
        )
