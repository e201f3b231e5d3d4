"""A text whose log-probs are known from one time to the next, and how closely they must agree."""

from __future__ import annotations

import torch
from torch import Tensor

from seqkd.checks.preflight import Checked
from seqkd.types import Rollout, TeacherScore

ENGLISH = (
    "The capital of France is Paris. Water boils at one hundred degrees, and most people sleep at "
    "night. She went to the market to buy some bread, and when she came home it was still warm."
)
ANSWER_TOKENS = 64
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2}
"""Nats a token by which two ways of computing the same log-probs may differ in the mean. Measured
on SmolLM2-135M, vLLM against transformers: 1e-5 in float32, 0.04 to 0.06 in bfloat16 (one token:
0.3)."""
UNIFORM = (0.9, 1.25)
"""Mean surprise of plain English, in units of ln V, of a head that knows nothing. Weights of
standard deviation s on states of norm r give -ln V - (s r)^2 / 2 in the mean: 1.05 for
SmolLM2-135M with a head of 0.02, whose own is 0.31."""


def english(checked: Checked) -> tuple[int, ...]:
    """Its tokens."""
    return tuple(checked.tokenizer(ENGLISH, add_special_tokens=False).input_ids)


def answers(checked: Checked, name: str, copies: int) -> list[Rollout]:
    """Plain English as the answer to a prompt of the run, ``copies`` times. An engine's scoring
    request takes room for one more token, so prompt and answer leave it."""
    room = checked.max_model_len - 1
    answer = english(checked)[:ANSWER_TOKENS]
    prompt = checked.train[0].token_ids[: max(1, room - len(answer))]
    answer = answer[: room - len(prompt)]
    return [as_rollout(f"{name}/{i}", prompt, answer, name) for i in range(copies)]


def as_rollout(
    sample_id: str, prompt: tuple[int, ...], completion: tuple[int, ...], prompt_id: str = ""
) -> Rollout:
    """Return a given text as a rollout. It counts as the student's: no cache may keep it."""
    prompt_id = prompt_id or sample_id
    return Rollout(prompt_id, sample_id, prompt, completion, None, "student", 0, "length")


def scored_tokens(score: TeacherScore) -> int:
    """Tokens that have a score."""
    values = score.hidden if score.hidden is not None else score.logprobs
    return 0 if values is None else len(values)


def distance(a: Tensor, b: Tensor) -> float:
    """Mean absolute difference."""
    return (a - b).abs().mean().item()


def tolerance(*precisions: str) -> float:
    """Nats a token, of the coarsest."""
    return max(TOLERANCE[precision] for precision in precisions)


def finite(values: Tensor) -> bool:
    """Whether every one of them is a finite number."""
    return bool(torch.isfinite(values).all())
