"""Study of the estimators on a real teacher and student: the variance of their gradients over
prompts, on the same completions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from seqkd.learner import batching
from seqkd.learner.student import StudentModel, as_token_stats, last_hidden
from seqkd.models.output_head import head_of
from seqkd.objectives import OBJECTIVES
from seqkd.types import Counts, Divergence, Prompt, Rollout, TeacherScore, TokenStats, add_padded

SKETCH = 2**16
"""Length of the random projection of a gradient. Squared norms are unbiased with a relative error
of about sqrt(2 / SKETCH)."""

ESTIMATORS: dict[str, tuple[str, dict[str, Any]]] = {
    f"{name}{', leave-one-out' if baseline != 'none' else ''}": (
        "sequence_reverse_kl",
        {"estimator": estimator, "baseline": baseline, "normalization": "total", **options},
    )
    for name, estimator, options in (
        ("reinforce", "reinforce", {}),
        ("reward_to_go", "reward_to_go", {}),
        ("single_step", "single_step", {}),
        ("rao_blackwell", "rao_blackwell", {}),
        ("minillm", "rao_blackwell", {"normalization": "minillm"}),
        ("discount 0.8", "rao_blackwell", {"discount": 0.8}),
    )
    for baseline in ("none", "leave_one_out")
} | {
    "rao_blackwell, rate, leave-one-out": ("sequence_reverse_kl", {"normalization": "rate"}),
    "sampled_token": ("sampled_token", {}),
    "token_reverse_kl": ("token_reverse_kl", {}),
}
LAYOUT = batching.Layout(tokens=1)
NAMES = ("student_logprob", "teacher_logprob", "reverse_kl", Divergence("token_reverse_kl"))


@dataclass(frozen=True)
class Variance:
    """Variance over prompts of an estimator's gradient, which is per sequence and computed from all
    samples of a prompt."""

    variance: float
    """Trace of the covariance over prompts."""
    signal: float
    """Squared norm of the mean gradient, corrected for the variance of the mean."""
    seconds: float
    """Seconds of the backward pass of one prompt."""


def sample(model: Any, prompt: Prompt, samples: int, tokens: int, eos: int) -> list[Rollout]:
    """Sample completions by ancestral sampling."""
    ids = torch.tensor([prompt.token_ids] * samples)
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, eos_token_id=eos,
        pad_token_id=eos, do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
        repetition_penalty=1.0,
    )  # fmt: skip
    name, rollouts = prompt.prompt_id, []
    for index, row in enumerate(output[:, ids.shape[1] :].tolist()):
        ended = eos in row
        completion = tuple(row[: row.index(eos) + 1] if ended else row)
        reason: Any = "stop" if ended else "length"
        sample_id = f"{name}/{index}"
        rollouts.append(
            Rollout(name, sample_id, prompt.token_ids, completion, None, "student", 0, reason)
        )
    return rollouts


def costs_by_position(
    student: Any, teacher: Any, groups: Sequence[list[Rollout]]
) -> tuple[Tensor, Tensor]:
    """Return [T] sums over completions of the reverse KL at position t, and [T] numbers of
    completions with a token t."""
    module, head = StudentModel(student), head_of(teacher)
    costs = survival = None
    with torch.no_grad():
        for group in groups:
            batch = batching.pack(group, _scores(teacher, group), group[0], LAYOUT)
            values = module(batch, ("reverse_kl",), head)[1]["reverse_kl"]
            costs = add_padded(costs, values.sum(0))
            survival = add_padded(survival, batch.loss_mask.sum(0).float())
    assert costs is not None and survival is not None
    return costs, survival


def measure(
    student: Any, teacher: Any, groups: Sequence[list[Rollout]], rate: float, seed: int
) -> dict[str, Variance]:
    """Measure variances over ``groups``, one per prompt. ``rate`` is in nats per token."""
    module, sketch = StudentModel(student), Sketch(student, seed)
    batches = [batching.pack(g, _scores(teacher, g), g[0], LAYOUT) for g in groups]
    head = head_of(teacher)
    gradients: dict[str, list[Tensor]] = {name: [] for name in ESTIMATORS}
    seconds = dict.fromkeys(ESTIMATORS, 0.0)
    for batch in batches:
        size = len(batch.loss_mask)
        # All losses are normalized per sequence, so that they are comparable.
        counts = Counts(size, tokens=size, rate=rate, length=1.0)
        _, values = module(batch, NAMES, head)
        stats = as_token_stats(batch, values, Divergence("token_reverse_kl"))
        for name in ESTIMATORS:
            start = time.perf_counter()
            gradients[name].append(sketch.project(_loss(name, stats, counts)))
            seconds[name] += time.perf_counter() - start
    return {
        name: _variance(torch.stack(rows), seconds[name] / len(groups))
        for name, rows in gradients.items()
    }


class Sketch:
    """Random projection (count sketch) of the gradient with respect to all parameters."""

    def __init__(self, model: nn.Module, seed: int) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        generator = torch.Generator().manual_seed(seed)
        self.places = [
            torch.randint(SKETCH, (p.numel(),), generator=generator) for p in self.parameters
        ]
        self.signs = [
            torch.randint(2, (p.numel(),), generator=generator, dtype=torch.int8) * 2 - 1
            for p in self.parameters
        ]

    def project(self, loss: Tensor) -> Tensor:
        """Return the [SKETCH] projection of d loss / d parameters; the graph is retained."""
        result = torch.zeros(SKETCH)
        gradients = torch.autograd.grad(loss, self.parameters, retain_graph=True)
        for gradient, place, sign in zip(gradients, self.places, self.signs, strict=True):
            result.index_add_(0, place, gradient.flatten() * sign)
        return result


def _loss(name: str, stats: TokenStats, counts: Counts) -> Tensor:
    kind, options = ESTIMATORS[name]
    return OBJECTIVES[kind](stats, counts, **options)


def _variance(gradients: Tensor, seconds: float) -> Variance:
    """Return unbiased estimates from [G, SKETCH] gradients."""
    groups, mean = len(gradients), gradients.mean(0)
    variance = ((gradients - mean) ** 2).sum().item() / (groups - 1)
    signal = (mean**2).sum().item() - variance / groups
    return Variance(variance, signal, seconds)


@torch.no_grad()
def _scores(teacher: Any, rollouts: list[Rollout]) -> dict[str, TeacherScore]:
    ids, mask = batching.padded([batching.fed_tokens(r) for r in rollouts])
    hidden = last_hidden(teacher, ids, mask)
    return {
        r.sample_id: TeacherScore(
            r.sample_id, hidden=row[: len(batching.fed_tokens(r))][batching.state_span(r)]
        )
        for r, row in zip(rollouts, hidden, strict=True)
    }
