"""Error of keeping only a teacher's k most probable tokens and the remaining tokens as one event:
in the divergence, and in its gradient with respect to the student's last hidden states."""

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
    """Results for the k most probable tokens of the teacher."""

    k: int
    """Number of tokens; 0 for the full distribution."""
    bytes: int
    """Bytes per token on disk."""
    tail: float
    """Mean total probability of all other tokens."""
    divergence: dict[str, float]
    """Mean over tokens of reverse and forward KL, nats."""
    gradient_error: dict[str, float]
    """Relative error |g_k - g| / |g| of the gradient of this mean."""


def measure(
    student: Any, teacher: Any, rollouts: Sequence[Rollout], ks: Sequence[int]
) -> list[Kept]:
    """Measure the full distribution, then each k, on the same completions."""
    states, teacher_states, targets = (
        torch.cat(parts)
        for parts in zip(*(_states(student, teacher, r) for r in rollouts), strict=True)
    )
    head = head_of(teacher)
    full = FullTeacher(teacher_states, head)
    rows: list[Kept] = []
    exact: dict[str, Tensor] = {}
    with torch.no_grad():
        logprobs = torch.log_softmax(head.finish(head.raw(teacher_states)), -1)
    for k in (0, *ks):
        distribution: KnownTeacher = full if k == 0 else TopTeacher(*top_teacher(logprobs, k))
        means, gradients = {}, {}
        for name in ("reverse_kl", "forward_kl"):
            leaf = states.clone().requires_grad_()
            mean = token_stats(leaf, head_of(student), targets, (name,), distribution)[name].mean()
            (gradients[name],) = torch.autograd.grad(mean, leaf)
            means[name] = mean.item()
        exact = exact or gradients
        errors = {n: ((g - exact[n]).norm() / exact[n].norm()).item() for n, g in gradients.items()}
        tail, size = 0.0, teacher_states.shape[1] * teacher_states.element_size()
        if isinstance(distribution, TopTeacher):
            tail, size = distribution.logprobs[:, -1].exp().mean().item(), 4 * (2 * k + 2)
        rows.append(Kept(k, size, tail, means, errors))
    return rows


@torch.no_grad()
def _states(student: Any, teacher: Any, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor]:
    """Return [T, H] student states, [T, H'] teacher states, and [T] the sampled tokens."""
    ids = torch.tensor([batching.fed_tokens(rollout)])
    span = batching.state_span(rollout)
    states, teacher_states = (
        last_hidden(model, ids, torch.ones_like(ids))[0, span] for model in (student, teacher)
    )
    return states, teacher_states, torch.tensor(rollout.completion_ids)
