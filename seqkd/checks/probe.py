"""Probe text that is scored repeatedly, and tolerances for its log-probs."""

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
"""Largest allowed mean difference, in nats per token, between two implementations of the same
log-probs. Measured on SmolLM2-135M, vLLM against transformers: 1e-5 in float32, 0.04 to 0.06 in
bfloat16 (single token: 0.3)."""
UNIFORM = (0.9, 1.25)
"""Range of the mean surprise of plain English under an untrained output head, in units of ln V.
Head weights of standard deviation s on states of norm r give a mean log-prob of
-ln V - (s r)^2 / 2. SmolLM2-135M with an untrained head of s = 0.02 has 1.05, with its own head
0.31."""


def english(checked: Checked) -> tuple[int, ...]:
    """Return the tokens of the English probe text."""
    return tuple(checked.tokenizer(ENGLISH, add_special_tokens=False).input_ids)


def answers(checked: Checked, name: str, copies: int) -> list[Rollout]:
    """Return ``copies`` rollouts with plain English as the answer to a prompt of the run. An
    engine's scoring request needs room for one more token, so prompt and answer are one token
    shorter than the context."""
    room = checked.max_model_len - 1
    answer = english(checked)[:ANSWER_TOKENS]
    prompt = checked.train[0].token_ids[: max(1, room - len(answer))]
    answer = answer[: room - len(prompt)]
    return [as_rollout(f"{name}/{i}", prompt, answer, name) for i in range(copies)]


def as_rollout(
    sample_id: str, prompt: tuple[int, ...], completion: tuple[int, ...], prompt_id: str = ""
) -> Rollout:
    """Return a given text as a rollout. Its source is the student, so no cache stores it."""
    prompt_id = prompt_id or sample_id
    return Rollout(prompt_id, sample_id, prompt, completion, None, "student", 0, "length")


def scored_tokens(score: TeacherScore) -> int:
    """Return the number of tokens that have a score."""
    values = score.hidden if score.hidden is not None else score.logprobs
    return 0 if values is None else len(values)


def distance(a: Tensor, b: Tensor) -> float:
    """Return the mean absolute difference."""
    return (a - b).abs().mean().item()


def tolerance(*precisions: str) -> float:
    """Return the tolerance of the coarsest precision, in nats per token."""
    return max(TOLERANCE[precision] for precision in precisions)


def finite(values: Tensor) -> bool:
    """Return True if all values are finite."""
    return bool(torch.isfinite(values).all())
