"""From hidden states and output heads to per-token log-probabilities and divergences.

The logits of a few hundred tokens at a time are formed, reduced to one number a token and thrown
away; the backward pass forms them again. Peak memory is a constant number of [chunk, V] tensors,
so it grows with N and never with N x V.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from seqkd.objectives import DIVERGENCES
from seqkd.types import Divergence, EndLogprob, Stat

CHUNK_ELEMENTS = 2**22
"""Elements of one [chunk, V] tensor: 16 MiB in float32. From 32 MiB on, glibc maps fresh pages for
every temporary and the kernel clears them: a third of the step on a CPU."""

STUDENT_ONLY = frozenset({"student_logprob", "entropy"})
STATS = ("student_logprob", "teacher_logprob", "reverse_kl", "forward_kl", "entropy")
MONITORED = {"reverse_kl": "token_reverse_kl", "forward_kl": "token_forward_kl"}
"""Divergences that have a name of their own, being reported whatever the objective."""


@dataclass(frozen=True)
class OutputHead:
    """The map from the last hidden state to logits: ``softcap(scale * (W h + b))``."""

    weight: Tensor
    """[V, H]"""
    bias: Tensor | None = None
    """[V]"""
    scale: float = 1.0
    softcap: float | None = None

    def first(self, rows: int) -> OutputHead:
        """The same for the first ``rows`` tokens alone."""
        bias = None if self.bias is None else self.bias[:rows]
        return OutputHead(self.weight[:rows], bias, self.scale, self.softcap)

    def raw(self, hidden: Tensor) -> Tensor:
        """[n, H] -> [n, V] float32, before scale and softcap."""
        raw = (hidden.to(self.weight) @ self.weight.T).float()
        return raw if self.bias is None else raw + self.bias.float()

    def finish(self, raw: Tensor) -> Tensor:
        """Apply scale and softcap."""
        logits = raw * self.scale if self.scale != 1.0 else raw
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits

    @torch.no_grad()
    def logprobs(
        self, hidden: Tensor, targets: Tensor, top_k: int = 0
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """[n, H], [n] -> [n] float32 log-probability of each target, and with ``top_k`` what
        :func:`top_teacher` makes of each distribution; in chunks."""
        chosen = hidden.new_empty(len(hidden), dtype=torch.float32)
        ids = torch.empty(len(hidden), top_k, dtype=torch.int32, device=hidden.device)
        top = chosen.new_empty(len(hidden), top_k + 1)
        for rows in _rows(len(hidden), self.weight):
            logprobs = torch.log_softmax(self.finish(self.raw(hidden[rows])), -1)
            chosen[rows] = _gather(logprobs, targets[rows])
            if top_k:
                ids[rows], top[rows] = top_teacher(logprobs, top_k)
        return (chosen, ids, top) if top_k else (chosen, None, None)


@dataclass(frozen=True)
class FullTeacher:
    """A teacher known by its hidden states: its whole distribution at every state."""

    hidden: Tensor
    """[N, H']"""
    head: OutputHead
    """Frozen."""

    def rows(self, rows: slice) -> FullTeacher:
        """The teacher at some of the states."""
        return FullTeacher(self.hidden[rows], self.head)


@dataclass(frozen=True)
class TopTeacher:
    """A teacher known by its k most probable tokens. Divergences are those between the two
    distributions over k + 1 events, the k tokens and all others (the tail): true divergences, never
    negative, and never above the divergence of the whole distributions."""

    ids: Tensor
    """[N, k]"""
    logprobs: Tensor
    """[N, k + 1], the tail last."""

    def rows(self, rows: slice) -> TopTeacher:
        """The teacher at some of the states."""
        return TopTeacher(self.ids[rows], self.logprobs[rows])


KnownTeacher = FullTeacher | TopTeacher


def top_teacher(logprobs: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """[N, V] log-probs -> ([N, k] int32, [N, k + 1]): the k largest, and the rest as one event."""
    values, ids = logprobs.topk(k)
    rest = logprobs.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return ids.to(torch.int32), torch.cat([values, rest], -1)


def token_stats(
    hidden: Tensor,
    head: OutputHead,
    targets: Tensor,
    names: tuple[Stat, ...],
    teacher: KnownTeacher | None = None,
) -> dict[Stat, Tensor]:
    """Per-token statistics, [N] float32 each, differentiable in ``hidden`` and ``head``.

    Args:
        hidden: [N, H] student states; targets: [N] the tokens drawn there.
        names: which of :data:`STATS`, divergences or :class:`seqkd.types.EndLogprob`; the first
            two need the teacher, but for :data:`STUDENT_ONLY`, and ``teacher_logprob`` needs a
            :class:`FullTeacher`.

    Where one vocabulary is padded beyond the other, both are read up to the shorter.
    """
    if not names:
        return {}
    work = _Work(head, targets, names, teacher)
    values = _ChunkedStats.apply(hidden, head.weight, head.bias, work)
    return dict(zip(names, values, strict=True))


def stats_of_logits(
    logits: Tensor, teacher_logits: Tensor, targets: Tensor, names: tuple[Stat, ...]
) -> dict[Stat, Tensor]:
    """The same from logits, [..., V] twice and [...]: for other trainers and small examples. Keeps
    whole [..., V] tensors for the backward pass."""
    flat = _reduce(
        logits.flatten(0, -2), teacher_logits.detach().flatten(0, -2), targets.flatten(), names
    )
    return {name: value.view(targets.shape) for name, value in flat.items()}


@dataclass(frozen=True)
class _Work:
    head: OutputHead
    targets: Tensor
    names: tuple[Stat, ...]
    teacher: KnownTeacher | None

    def values(self, raw: Tensor, rows: slice, names: tuple[Stat, ...]) -> dict[Stat, Tensor]:
        """[n] a name, of the states ``rows`` with raw logits [n, V]."""
        teacher: Tensor | TopTeacher | None = None
        if not all(name in STUDENT_ONLY or isinstance(name, EndLogprob) for name in names):
            assert self.teacher is not None
            part = self.teacher.rows(rows)
            if isinstance(part, FullTeacher):
                teacher = part.head.finish(part.head.raw(part.hidden))
            else:
                teacher = part
        return _reduce(self.head.finish(raw), teacher, self.targets[rows], names)


class _ChunkedStats(torch.autograd.Function):
    """[N, H] -> one [N] tensor a name, recomputing each chunk's logits in the backward pass."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, work):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(hidden, weight, bias)
        ctx.work = work
        ctx.set_materialize_grads(False)
        out = {name: hidden.new_empty(len(hidden), dtype=torch.float32) for name in work.names}
        for rows in _rows(len(hidden), weight):
            raw = work.head.raw(hidden[rows])
            for name, value in work.values(raw, rows, work.names).items():
                out[name][rows] = value
        return tuple(out[name] for name in work.names)

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        hidden, weight, bias = ctx.saved_tensors
        work: _Work = ctx.work
        given = {n: g for n, g in zip(work.names, grads, strict=True) if g is not None}
        given.pop("teacher_logprob", None)
        names = tuple(given)
        # What is frozen costs nothing. The head of a student with adapters is.
        of_hidden, of_weight, of_bias, _ = ctx.needs_input_grad
        d_hidden = torch.zeros_like(hidden) if of_hidden else None
        # float32 accumulators: many chunks are added, and bfloat16 would lose the small ones.
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if of_weight else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if of_bias else None
        for rows in _rows(len(hidden), weight) if names else ():
            with torch.enable_grad():
                raw = work.head.raw(hidden[rows].detach()).detach().requires_grad_()
                values = work.values(raw, rows, names)
                total = sum((values[name] * given[name][rows]).sum() for name in names)
                (d_raw,) = torch.autograd.grad(total, raw)
            if d_hidden is not None:
                d_hidden[rows] = (d_raw.to(weight.dtype) @ weight).to(hidden.dtype)
            if d_weight is not None:
                d_weight.addmm_(d_raw.T, hidden[rows].float())
            if d_bias is not None:
                d_bias += d_raw.sum(0)
        return (
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(bias.dtype),
            None,
        )


def _reduce(
    logits: Tensor,
    teacher: Tensor | TopTeacher | None,
    targets: Tensor,
    names: tuple[Stat, ...],
) -> dict[Stat, Tensor]:
    """[n, V] logits, the teacher's logits or its most probable tokens -> [n] a name."""
    if isinstance(teacher, Tensor) and teacher.shape[-1] != logits.shape[-1]:
        size = min(teacher.shape[-1], logits.shape[-1])
        logits, teacher = logits[:, :size], teacher[:, :size]
    log_q = torch.log_softmax(logits, -1)
    values: dict[Stat, Tensor] = {}
    if "student_logprob" in names:
        values["student_logprob"] = _gather(log_q, targets)
    if "entropy" in names:
        values["entropy"] = -(log_q.exp() * log_q).sum(-1)
    for name in names:
        if isinstance(name, EndLogprob):
            values[name] = log_q[:, list(name.token_ids)].logsumexp(-1)
    if teacher is None:
        return values
    if "teacher_logprob" in names:
        assert isinstance(teacher, Tensor)
        values["teacher_logprob"] = _gather(torch.log_softmax(teacher, -1), targets)
    wanted: dict[Stat, Divergence] = {n: n for n in names if isinstance(n, Divergence)}
    wanted |= {n: Divergence(MONITORED[n]) for n in MONITORED if n in names}
    for temperature in dict.fromkeys(d.temperature for d in wanted.values()):
        ours, theirs = _distributions(logits, log_q, teacher, temperature)
        for name, (kind, coefficient, of) in wanted.items():
            if of == temperature:
                options = () if coefficient is None else (coefficient,)
                values[name] = DIVERGENCES[kind](ours, theirs, *options) * temperature**2
    return values


def _distributions(
    logits: Tensor, log_q: Tensor, teacher: Tensor | TopTeacher, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probs of student and teacher over the same events, [n, V] or [n, k + 1] each."""
    if isinstance(teacher, TopTeacher):
        ids = teacher.ids.long()
        rest = log_q.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        return torch.cat([log_q.gather(-1, ids), rest], -1), teacher.logprobs
    if temperature == 1.0:
        return log_q, torch.log_softmax(teacher, -1)
    return torch.log_softmax(logits / temperature, -1), torch.log_softmax(teacher / temperature, -1)


def _gather(logprobs: Tensor, targets: Tensor) -> Tensor:
    return logprobs.gather(-1, targets[:, None]).squeeze(-1)


def _chunk(weight: Tensor) -> int:
    return max(1, CHUNK_ELEMENTS // weight.shape[0])


def _rows(count: int, weight: Tensor) -> list[slice]:
    size = _chunk(weight)
    return [slice(low, low + size) for low in range(0, count, size)]
