"""Lower bounds of a learner's step: bare passes of the student, and products with heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seqkd.learner import batching
from seqkd.learner.student import last_hidden
from seqkd.types import Rollout


def micro_batches(rollouts: Sequence[Rollout], tokens: int) -> list[tuple[Tensor, Tensor]]:
    """Return token ids and attention masks as the learner batches them without shared prompts."""
    (slots,) = batching.partition(rollouts, {}, 1, batching.Layout(tokens))
    return [batching.padded([batching.fed_tokens(r) for r in slot]) for slot in slots]


def learn(
    model: Any, batches: Sequence[tuple[Tensor, Tensor]], heads: Sequence[Tensor], tokens: int,
    chunk: int,
) -> None:  # fmt: skip
    """Run the body of ``model`` forward and backward. Then multiply ``tokens`` states, ``chunk`` at
    a time, by each of ``heads``, and twice more by the first, as in its backward pass."""
    for ids, mask in batches:
        last_hidden(model, ids.to(model.device), mask.to(model.device)).sum().backward()
    head, widest = heads[0], max(heads, key=lambda weight: weight.shape[1])
    noise = torch.randn_like(widest[:chunk])
    states = [noise[:, : weight.shape[1]].contiguous() for weight in heads]
    gradient, room = torch.zeros_like(head), head.new_empty(chunk, len(head))
    for start in range(0, tokens, chunk):
        size = min(chunk, tokens - start)
        logits = room[:size]
        for weight, inputs in zip(reversed(heads), reversed(states), strict=True):
            torch.mm(inputs[:size], weight.T, out=logits)
        logits @ head
        gradient.addmm_(logits.T, states[0][:size])
    model.zero_grad()
