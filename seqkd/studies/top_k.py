"""What is lost by keeping a teacher's k most probable tokens and the rest as one event: the
divergence itself, and its gradient with respect to the student's last hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seqkd.learner import batching
from seqkd.learner.student import last_hidden
from seqkd.learner.teacher_distribution import FullTeacher, KnownTeacher, TopTeacher
from seqkd.learner.token_stats import token_stats
from seqkd.models.output_head import head_of, top_teacher
from seqkd.types import Rollout


@dataclass(frozen=True)
class Kept:
    """One row of the table: a teacher known by its k most probable tokens."""

    k: int
    """0 for the whole distribution."""
    bytes: int
    """Of a token on disk."""
    tail: float
    """Mean probability of what is not named."""
    divergence: dict[str, float]
    """Mean over tokens of reverse and forward KL, nats."""
    gradient_error: dict[str, float]
    """|g_k - g| / |g| of that mean's gradient."""


def measure(
    student: Any, teacher: Any, rollouts: Sequence[Rollout], ks: Sequence[int]
) -> list[Kept]:
    """The whole distribution first, then each k, on the same completions."""
    states, theirs, targets = (
        torch.cat(parts)
        for parts in zip(*(_states(student, teacher, r) for r in rollouts), strict=True)
    )
    head = head_of(teacher)
    full = FullTeacher(theirs, head)
    rows: list[Kept] = []
    whole: dict[str, Tensor] = {}
    with torch.no_grad():
        logprobs = torch.log_softmax(head.finish(head.raw(theirs)), -1)
    for k in (0, *ks):
        known: KnownTeacher = full if k == 0 else TopTeacher(*top_teacher(logprobs, k))
        means, gradients = {}, {}
        for name in ("reverse_kl", "forward_kl"):
            leaf = states.clone().requires_grad_()
            mean = token_stats(leaf, head_of(student), targets, (name,), known)[name].mean()
            (gradients[name],) = torch.autograd.grad(mean, leaf)
            means[name] = mean.item()
        whole = whole or gradients
        errors = {n: ((g - whole[n]).norm() / whole[n].norm()).item() for n, g in gradients.items()}
        tail = known.logprobs[:, -1].exp().mean().item() if isinstance(known, TopTeacher) else 0.0
        size = 4 * (2 * k + 2) if k else theirs.shape[1] * theirs.element_size()
        rows.append(Kept(k, size, tail, means, errors))
    return rows


@torch.no_grad()
def _states(student: Any, teacher: Any, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor]:
    """[T, H] of the student, [T, H'] of the teacher, [T] what was drawn there."""
    ids = torch.tensor([batching.fed_tokens(rollout)])
    span = batching.state_span(rollout)
    ours, theirs = (last_hidden(m, ids, torch.ones_like(ids))[0, span] for m in (student, teacher))
    return ours, theirs, torch.tensor(rollout.completion_ids)
