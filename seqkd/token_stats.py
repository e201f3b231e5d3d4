"""From hidden states and output heads to per-token log-probabilities and divergences, and to a loss
made of them.

The logits of a few hundred tokens at a time are formed, reduced to one number a token and thrown
away. Peak memory is a constant number of [chunk, V] tensors, so it grows with N and never with
N x V. A loss (:func:`token_loss`) sends its gradient back while a chunk's logits are there, so that
they are formed once: four products with a head in all, of student, teacher and two gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from seqkd.objectives import DIVERGENCES
from seqkd.types import Divergence, EndLogprob, Stat

CHUNK_ELEMENTS = 2**22
"""Elements of one [chunk, V] tensor: 16 MiB in float32. From 32 MiB on, glibc maps fresh pages for
every temporary and the kernel clears them: a third of the step on a CPU."""

STUDENT_ONLY = frozenset({"student_logprob", "entropy"})
STATS = ("student_logprob", "teacher_logprob", "reverse_kl", "forward_kl", "entropy")
Rows = slice | Tensor
"""Which of N states: a range, or their indices."""
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

    def rows(self, rows: Rows) -> FullTeacher:
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

    def rows(self, rows: Rows) -> TopTeacher:
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
    """Per-token statistics, [N] float32 each, differentiable in ``hidden`` and ``head``; the
    backward pass forms the logits again.

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
    values = _Statistics.apply(hidden, head.weight, head.bias, work)
    return dict(zip(names, values, strict=True))


Objective = Callable[[Mapping[Stat, Tensor]], Tensor]
"""From [N] float32 statistics, by name, to a scalar to minimise."""


def token_loss(
    hidden: Tensor,
    head: OutputHead,
    targets: Tensor,
    names: tuple[Stat, ...],
    teacher: KnownTeacher | None,
    objective: Objective,
    position: Tensor,
    group: Tensor,
) -> tuple[Tensor, dict[Stat, Tensor]]:
    """What ``objective`` makes of the statistics of :func:`token_stats`, differentiable in
    ``hidden`` and ``head``; and the statistics, which are not.

    The states are walked from the last ``position`` ([N], within its completion) to the first,
    those of one ``group`` ([N], the samples of one prompt) together, and each chunk's gradient is
    sent back at once. That asks for the objective's slope at a state when the earlier ones are not
    known yet, which is right for every objective that looks at a token and its future alone, as
    returns and their leave-one-out baseline do. In the end the slopes are compared with those that
    all statistics give; where they differ (the whole sequence's return, an importance weight of the
    sequence) the walk is taken again with the right ones: the result is exact for every objective,
    and six products with a head in place of four are the price.
    """
    work = _Work(head, targets, names, teacher)
    order = _from_the_end(position, group, _chunk(head.weight))
    loss, *values = _Loss.apply(hidden, head.weight, head.bias, work, objective, order)
    return loss, dict(zip(names, values, strict=True))


def stats_of_logits(
    logits: Tensor, teacher_logits: Tensor, targets: Tensor, names: tuple[Stat, ...]
) -> dict[Stat, Tensor]:
    """The same from logits, [..., V] twice and [...]: for other trainers and small examples. Keeps
    whole [..., V] tensors for the backward pass."""
    states = _States(
        logits.flatten(0, -2), teacher_logits.detach().flatten(0, -2), targets.flatten()
    )
    return {name: value.view(targets.shape) for name, value in states.statistics(names).items()}


@dataclass(frozen=True)
class _Work:
    head: OutputHead
    targets: Tensor
    names: tuple[Stat, ...]
    teacher: KnownTeacher | None

    def states(self, raw: Tensor, rows: Rows) -> _States:
        """The states ``rows``, whose raw logits are [n, V]."""
        teacher = None if self.teacher is None else self.teacher.rows(rows)
        return _States(self.head.finish(raw), teacher, self.targets[rows])


Slopes = Mapping[Stat, Tensor]
"""[N] by name: the derivative of a loss by each statistic that it depends on."""


def _gradients(
    work: _Work,
    hidden: Tensor,
    needed: Sequence[bool],
    order: Sequence[Rows],
    names: tuple[Stat, ...],
    slopes_at: Callable[[Rows, _States, Mapping[Stat, Tensor]], Slopes],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of hidden states, weight and bias, where ``needed``: what is frozen costs nothing (the head
    of a student with adapters is). ``slopes_at`` is asked for each chunk of states in turn, whose
    statistics ``names`` it is given."""
    weight, bias = work.head.weight, work.head.bias
    of_hidden = torch.zeros_like(hidden) if needed[0] else None
    # Float32 sums: many chunks are added, and bfloat16 would lose the small ones.
    of_weight = torch.zeros_like(weight, dtype=torch.float32) if needed[1] else None
    of_bias = (
        torch.zeros_like(bias, dtype=torch.float32) if needed[2] and bias is not None else None
    )
    for rows in order if names else ():
        here = hidden[rows].detach()
        with torch.enable_grad():
            raw = work.head.raw(here).detach().requires_grad_()
            states = work.states(raw, rows)
            values = states.statistics(names)
            slopes = slopes_at(rows, states, values)
            total = torch.stack([(values[name] * slopes[name][rows]).sum() for name in names]).sum()
            (d_raw,) = torch.autograd.grad(total, raw)
        if of_hidden is not None:
            of_hidden[rows] = (d_raw.to(weight.dtype) @ weight).to(hidden.dtype)
        if of_weight is not None:
            of_weight.addmm_(d_raw.T, here.float())
        if of_bias is not None:
            of_bias += d_raw.sum(0)
    return (
        of_hidden,
        None if of_weight is None else of_weight.to(weight.dtype),
        None if of_bias is None or bias is None else of_bias.to(bias.dtype),
    )


class _Statistics(torch.autograd.Function):
    """[N, H] -> one [N] tensor a name, recomputing each chunk's logits in the backward pass."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, work):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(hidden, weight, bias)
        ctx.work = work
        ctx.set_materialize_grads(False)
        out = {name: hidden.new_empty(len(hidden), dtype=torch.float32) for name in work.names}
        for rows in _rows(len(hidden), weight):
            states = work.states(work.head.raw(hidden[rows]), rows)
            for name, value in states.statistics(work.names).items():
                out[name][rows] = value
        return tuple(out[name] for name in work.names)

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        work: _Work = ctx.work
        hidden, weight, _ = ctx.saved_tensors
        slopes = {n: g for n, g in zip(work.names, grads, strict=True) if g is not None}
        slopes.pop("teacher_logprob", None)
        order = _rows(len(hidden), weight)
        needed, names = ctx.needs_input_grad, tuple(slopes)
        return (*_gradients(work, hidden, needed, order, names, lambda *_: slopes), None)


class _Loss(torch.autograd.Function):
    """[N, H] -> the loss, and one [N] tensor a name. The gradient is there when the forward pass
    ends."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, work, objective, order):  # type: ignore[no-untyped-def]
        known = {n: hidden.new_zeros(len(hidden), dtype=torch.float32) for n in work.names}
        learnt = tuple(_slopes(objective, known)[1])
        assert learnt, "an objective that depends on no statistic of the student"
        watched = tuple(name for name in work.names if name not in learnt)
        used = {name: torch.zeros_like(known[name]) for name in learnt}

        def as_known_so_far(rows: Rows, states: _States, values: Mapping[Stat, Tensor]) -> Slopes:
            with torch.no_grad():
                for name, value in (*values.items(), *states.statistics(watched).items()):
                    known[name][rows] = value
            slopes = _slopes(objective, known)[1]
            for name in learnt:
                used[name][rows] = slopes[name][rows]
            return slopes

        gradients = _gradients(work, hidden, ctx.needs_input_grad, order, learnt, as_known_so_far)
        loss, slopes = _slopes(objective, known)
        if not all(_alike(used[name], slopes[name]) for name in learnt):
            gradients = _gradients(
                work, hidden, ctx.needs_input_grad, order, learnt, lambda *_: slopes
            )
        ctx.gradients = gradients
        every = tuple(known[name] for name in work.names)
        ctx.mark_non_differentiable(*every)
        return (loss, *every)

    @staticmethod
    def backward(ctx, slope, *_):  # type: ignore[no-untyped-def]
        return (*(None if g is None else g * slope for g in ctx.gradients), None, None, None)


def _slopes(
    objective: Objective, known: Mapping[Stat, Tensor]
) -> tuple[Tensor, dict[Stat, Tensor]]:
    """The loss, and its derivative by each statistic that it depends on, [N]. The teacher's is
    none: it does not learn."""
    with torch.enable_grad():
        leaves = {
            name: value.detach().requires_grad_(name != "teacher_logprob")
            for name, value in known.items()
        }
        loss = objective(leaves)
    by = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    found = torch.autograd.grad(loss, list(by.values()), allow_unused=True)
    return loss.detach(), {n: g for n, g in zip(by, found, strict=True) if g is not None}


def _alike(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two slopes differ by rounding alone."""
    if not len(theirs):
        return True
    return bool((ours - theirs).abs().max() <= 1e-5 * theirs.abs().max())


@dataclass
class _States:
    """n states with all their logits; what they are asked for is computed once."""

    logits: Tensor
    """[n, V]"""
    teacher: KnownTeacher | Tensor | None
    """A tensor: its logits, [n, V]."""
    targets: Tensor
    """[n]"""

    def __post_init__(self) -> None:
        if isinstance(self.teacher, FullTeacher):
            self.logits = self.logits[:, : len(self.teacher.head.weight)]
        elif isinstance(self.teacher, Tensor):
            self.logits = self.logits[:, : self.teacher.shape[-1]]

    @cached_property
    def teacher_logits(self) -> Tensor:
        """[n, V]"""
        of = self.teacher
        if isinstance(of, FullTeacher):
            with torch.no_grad():
                of = of.head.finish(of.head.raw(of.hidden))
        assert isinstance(of, Tensor)
        return of[:, : self.logits.shape[-1]]

    @cached_property
    def log_q(self) -> Tensor:
        """[n, V]"""
        return torch.log_softmax(self.logits, -1)

    @cached_property
    def log_p(self) -> Tensor:
        """[n, V]"""
        return torch.log_softmax(self.teacher_logits, -1)

    def pair(self, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probs of student and teacher over the same events, [n, V] or [n, k + 1] each."""
        if isinstance(self.teacher, TopTeacher):
            ids = self.teacher.ids.long()
            rest = self.log_q.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
            return torch.cat([self.log_q.gather(-1, ids), rest], -1), self.teacher.logprobs
        if temperature == 1.0:
            return self.log_q, self.log_p
        both = (self.logits, self.teacher_logits)
        ours, theirs = (torch.log_softmax(logits / temperature, -1) for logits in both)
        return ours, theirs

    def statistics(self, names: tuple[Stat, ...]) -> dict[Stat, Tensor]:
        """[n] a name."""
        values: dict[Stat, Tensor] = {}
        for name in names:
            if isinstance(name, EndLogprob):
                values[name] = self.log_q[:, list(name.token_ids)].logsumexp(-1)
            elif name == "student_logprob":
                values[name] = _gather(self.log_q, self.targets)
            elif name == "teacher_logprob":
                values[name] = _gather(self.log_p, self.targets)
            elif name == "entropy":
                values[name] = -(self.log_q.exp() * self.log_q).sum(-1)
            else:
                kind, coefficient, temperature = (
                    name if isinstance(name, Divergence) else Divergence(MONITORED[name])
                )
                options = () if coefficient is None else (coefficient,)
                value = DIVERGENCES[kind](*self.pair(temperature), *options)
                values[name] = value * temperature**2
        return values


def _gather(logprobs: Tensor, targets: Tensor) -> Tensor:
    return logprobs.gather(-1, targets[:, None]).squeeze(-1)


def _chunk(weight: Tensor) -> int:
    return max(1, CHUNK_ELEMENTS // weight.shape[0])


def _rows(count: int, weight: Tensor) -> list[slice]:
    size = _chunk(weight)
    return [slice(low, low + size) for low in range(0, count, size)]


def _from_the_end(position: Tensor, group: Tensor, size: int) -> list[Tensor]:
    """Indices of all states from the last position to the first, in chunks of about ``size``: the
    samples of a prompt at one position are in one chunk, unless they alone are more."""
    key = group - position * (int(group.max()) + 1 if len(group) else 1)
    order = key.argsort(stable=True)
    _, counts = torch.unique_consecutive(key[order], return_counts=True)
    sizes = [0]
    for count in counts.tolist():
        if sizes[-1] and sizes[-1] + count > size:
            sizes.append(0)
        sizes[-1] += count
    return [part for whole in order.split(sizes) for part in whole.split(size) if len(part)]
