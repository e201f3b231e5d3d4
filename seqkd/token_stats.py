"""From hidden states and output heads to per-token log-probabilities and divergences.

The logits of a few hundred tokens at a time are formed, reduced to one number a token and thrown
away; the backward pass forms them again. Peak memory is a constant number of [chunk, V] tensors,
so it grows with N and never with N x V.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**22
"""Elements of one [chunk, V] tensor: 16 MiB in float32. From 32 MiB on, glibc maps fresh pages for
every temporary and the kernel clears them: a third of the step on a CPU."""

STUDENT_ONLY = frozenset({"student_logprob", "entropy"})
STATS = ("student_logprob", "teacher_logprob", "reverse_kl", "forward_kl", "entropy")


@dataclass(frozen=True)
class OutputHead:
    """The map from the last hidden state to logits: ``softcap(scale * (W h + b))``."""

    weight: Tensor
    """[V, H]"""
    bias: Tensor | None = None
    """[V]"""
    scale: float = 1.0
    softcap: float | None = None

    def raw(self, hidden: Tensor) -> Tensor:
        """[n, H] -> [n, V] float32, before scale and softcap."""
        raw = (hidden.to(self.weight.dtype) @ self.weight.T).float()
        return raw if self.bias is None else raw + self.bias.float()

    def finish(self, raw: Tensor) -> Tensor:
        """Apply scale and softcap."""
        logits = raw * self.scale if self.scale != 1.0 else raw
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits

    def logprobs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """[n, H], [n] -> [n] float32 log-probability of each target, in chunks, no gradient."""
        with torch.no_grad():
            parts = [
                _gather(torch.log_softmax(self.finish(self.raw(h)), -1), t)
                for h, t in zip(
                    hidden.split(_chunk(self.weight)),
                    targets.split(_chunk(self.weight)),
                    strict=True,
                )
            ]
        return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)


def token_stats(
    hidden: Tensor,
    head: OutputHead,
    targets: Tensor,
    names: tuple[str, ...],
    teacher_hidden: Tensor | None = None,
    teacher_head: OutputHead | None = None,
) -> dict[str, Tensor]:
    """Per-token statistics, [N] float32 each, differentiable in ``hidden`` and ``head``.

    Args:
        hidden: [N, H] student states; targets: [N] the tokens drawn there.
        names: which of :data:`STATS`; those outside :data:`STUDENT_ONLY` need the teacher.
        teacher_hidden: [N, H'] teacher states, with teacher_head its frozen head.

    Where one vocabulary is padded beyond the other, both are read up to the shorter.
    """
    if not names:
        return {}
    work = _Work(head, targets, names, teacher_hidden, teacher_head)
    values = _ChunkedStats.apply(hidden, head.weight, head.bias, work)
    return dict(zip(names, values, strict=True))


@dataclass(frozen=True)
class _Work:
    head: OutputHead
    targets: Tensor
    names: tuple[str, ...]
    teacher_hidden: Tensor | None
    teacher_head: OutputHead | None

    def teacher_logits(self, rows: slice, names: tuple[str, ...]) -> Tensor | None:
        if STUDENT_ONLY.issuperset(names):
            return None
        assert self.teacher_hidden is not None and self.teacher_head is not None
        return self.teacher_head.finish(self.teacher_head.raw(self.teacher_hidden[rows]))


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
            logits, teacher = work.head.finish(raw), work.teacher_logits(rows, work.names)
            for name, value in _reduce(logits, teacher, work.targets[rows], work.names).items():
                out[name][rows] = value
        return tuple(out[name] for name in work.names)

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        hidden, weight, bias = ctx.saved_tensors
        work: _Work = ctx.work
        given = {n: g for n, g in zip(work.names, grads, strict=True) if g is not None}
        given.pop("teacher_logprob", None)
        names = tuple(given)
        d_hidden = torch.zeros_like(hidden)
        # float32 accumulators: many chunks are added, and bfloat16 would lose the small ones.
        d_weight = torch.zeros_like(weight, dtype=torch.float32)
        d_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        for rows in _rows(len(hidden), weight) if names else ():
            with torch.enable_grad():
                raw = work.head.raw(hidden[rows].detach()).detach().requires_grad_()
                logits, teacher = work.head.finish(raw), work.teacher_logits(rows, names)
                values = _reduce(logits, teacher, work.targets[rows], names)
                total = sum((values[name] * given[name][rows]).sum() for name in names)
                (d_raw,) = torch.autograd.grad(total, raw)
            low = d_raw.to(weight.dtype)
            d_hidden[rows] = (low @ weight).to(hidden.dtype)
            d_weight.addmm_(d_raw.T, hidden[rows].float())
            if d_bias is not None:
                d_bias += d_raw.sum(0)
        return (
            d_hidden,
            d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(bias.dtype),
            None,
        )


def _reduce(
    logits: Tensor, teacher: Tensor | None, targets: Tensor, names: tuple[str, ...]
) -> dict[str, Tensor]:
    """[n, V] logits -> [n] a name. The definitions, as written."""
    if teacher is not None and teacher.shape[-1] != logits.shape[-1]:
        size = min(teacher.shape[-1], logits.shape[-1])
        logits, teacher = logits[:, :size], teacher[:, :size]
    log_q = torch.log_softmax(logits, -1)
    values = {}
    if "student_logprob" in names:
        values["student_logprob"] = _gather(log_q, targets)
    if "entropy" in names:
        values["entropy"] = -(log_q.exp() * log_q).sum(-1)
    if teacher is None:
        return values
    log_p = torch.log_softmax(teacher, -1)
    if "teacher_logprob" in names:
        values["teacher_logprob"] = _gather(log_p, targets)
    if "reverse_kl" in names:
        values["reverse_kl"] = (log_q.exp() * (log_q - log_p)).sum(-1)
    if "forward_kl" in names:
        values["forward_kl"] = (log_p.exp() * (log_p - log_q)).sum(-1)
    return values


def _gather(logprobs: Tensor, targets: Tensor) -> Tensor:
    return logprobs.gather(-1, targets[:, None]).squeeze(-1)


def _chunk(weight: Tensor) -> int:
    return max(1, CHUNK_ELEMENTS // weight.shape[0])


def _rows(count: int, weight: Tensor) -> list[slice]:
    size = _chunk(weight)
    return [slice(low, low + size) for low in range(0, count, size)]
