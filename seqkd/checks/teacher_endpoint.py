"""What can be wrong with a teacher's endpoint, found before the first step by a few requests."""

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
from seqkd.teachers.endpoint import UNREADABLE, EndpointClient, Request, cause, key_of, same_model

TEXT = (
    "Water boils at a lower temperature on a mountain, because the air there presses less. In 1648 "
    "Florin Périer carried a barometer up the Puy de Dôme and saw its mercury fall by 8 cm; his "
    "brother-in-law, Blaise Pascal, had asked him to. What would you expect on the Moon? "
)
TOLERANCE = {"float32": (1e-3, 0.01), "bfloat16": (0.05, 0.5)}
"""Nats by precision: the mean difference of one text scored twice (the batch that a text is
computed in changes the rounding), and the largest one from the checkpoint on another engine."""
UNIFORM = 0.1
"""Nats from -ln V: closer than that at every token, a model knows nothing."""
COMPARED_TOKENS = 64


def check_endpoint(config: EndpointTeacherConfig) -> EndpointClient:
    """A client for the other checks; ModelError unless the endpoint answers, takes the key and
    serves the model."""
    import openai

    key = key_of(config)
    # What is wrong here stays wrong: fewer repetitions than the run may take.
    patient = config.model_copy(update={"max_retries": min(config.max_retries, 5)})
    client = openai.OpenAI(base_url=config.base_url, api_key=key, timeout=20, max_retries=3)
    try:
        served = _served(client)
    except openai.NotFoundError:  # an endpoint need not list its models
        return EndpointClient(patient, key)
    except (*UNREADABLE, openai.OpenAIError) as error:
        raise ModelError(
            f"teacher.base_url: {config.base_url} does not list its models: {cause(error, key)}. "
            f"Check the address (it mostly ends in /v1) and the key in {config.api_key_env}."
        ) from None
    if not any(same_model(name, config.model) for name in served):
        raise ModelError(
            f"teacher.model: {config.model!r} is not served at {config.base_url}, which has "
            f"{', '.join(map(repr, served)) or 'none'}."
        )
    return EndpointClient(patient, key)


def _served(client: Any) -> list[str]:
    """Names of the models; asked for again where the answer is no JSON, as a cut one is."""
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
    """At most six requests of at most one prompt and completion each. ModelError (or ActorError,
    from the client) where prompts are truncated or another model answers; where scores are wanted,
    also where they are missing, do not repeat, are near-uniform over ``vocabulary`` tokens or are
    not those of ``teacher.checkpoint``."""
    teacher, longest = client.config, data.max_prompt_tokens
    if teacher.by_text:
        _reads_all_text(client, tokenizer, longest)
    if teacher.scores == "none":
        return
    # As long as the longest that will be scored; its start differs from all that follows it.
    ids = _tokens(tokenizer, longest + rollout.max_tokens)
    changed = [ids[1], *ids[1:]]
    top_k = teacher.top_k if teacher.scores == "top_k" else 0
    first, second, third = (s.logprobs for s in client.score([ids, ids, changed], top_k))
    _repeats(teacher, first, second)
    half = len(first) // 2
    if half and first[half:] == third[half:]:
        raise ModelError(
            f"teacher.base_url: {teacher.base_url} truncates prompts: of {len(ids)} tokens, "
            "changing the first changes no log-prob in the second half. Raise the context of the "
            "server, or lower data.max_prompt_tokens."
        )
    if all(abs(value + math.log(vocabulary)) < UNIFORM for value in first):
        raise ModelError(
            f"teacher.model: {teacher.model!r} at {teacher.base_url} gives every token a log-prob "
            f"within {UNIFORM} of -ln {vocabulary} = {-math.log(vocabulary):.4g}: it knows "
            "nothing, as a model without its weights. Restart the server with the checkpoint."
        )
    if teacher.checkpoint is not None:
        _is_the_checkpoint(teacher, ids[:COMPARED_TOKENS], first)


def _tokens(tokenizer: Any, length: int) -> list[int]:
    piece: list[int] = tokenizer(TEXT, add_special_tokens=False).input_ids
    return (piece * -(-length // len(piece)))[:length]


def _reads_all_text(client: EndpointClient, tokenizer: Any, longest: int) -> None:
    """Of a prompt and one twice as long, the second must have as many more tokens as the first has
    more than next to nothing, in the teacher's tokens and whatever its template adds."""

    def requests(*texts: str) -> list[Request]:
        return [Request((("user", text),), text, seed=0) for text in texts]

    (empty,) = client.prompt_tokens(requests("a"))
    size = (longest - empty) // 2
    if size < 8:  # such prompts are too short for a template's own tokens not to blur the counts
        return
    text = tokenizer.decode(_tokens(tokenizer, size))
    once, twice = client.prompt_tokens(requests(text, text + text))
    # One token less for the seam; some more where the teacher's tokens are longer than ours.
    if twice - once < max(1, 0.8 * (once - empty) - 1):
        raise ModelError(
            f"teacher.base_url: {client.config.base_url} truncates prompts: it read {once} tokens "
            f"of one and {twice} of one twice as long. Raise the context of the server, or lower "
            f"data.max_prompt_tokens = {longest}."
        )


def _repeats(
    teacher: EndpointTeacherConfig, first: Sequence[float], second: Sequence[float]
) -> None:
    differences = [abs(a - b) for a, b in zip(first, second, strict=True)]
    mean, tolerance = sum(differences) / len(differences), TOLERANCE[teacher.precision][0]
    if mean > tolerance:
        raise ModelError(
            f"teacher.base_url: {teacher.base_url} is not deterministic: the log-probs of one text "
            f"scored twice differ by {mean:.3g} nats a token (at most {max(differences):.3g}), "
            f"more than {tolerance} for teacher.precision {teacher.precision!r}. Use one server, "
            "with one model and without noise."
        )


def _is_the_checkpoint(teacher: EndpointTeacherConfig, ids: list[int], served: list[float]) -> None:
    import torch

    from seqkd.learner.student import last_hidden
    from seqkd.models.loading import load_causal_lm, load_config
    from seqkd.models.output_head import head_of

    assert teacher.checkpoint is not None
    load_config(teacher.checkpoint, "teacher.checkpoint")
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
            f"{teacher.checkpoint!r}: the log-probs of a short text differ by up to {gap:.3g} "
            f"nats, more than {tolerance} for teacher.precision {teacher.precision!r}. Serve that "
            "checkpoint, or correct teacher.checkpoint or teacher.precision."
        )
