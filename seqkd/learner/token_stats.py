"""From hidden states and output heads to per-token log-probabilities and divergences, and to a loss
made of them.

The logits of a few hundred tokens at a time are formed, reduced to one number per token, block by
block, and discarded. Peak memory is two [chunk, V] tensors and some [block, V] ones (see
:mod:`seqkd.models.output_head`), so it grows with N and never with N x V. A loss
(:func:`token_loss`) sends its gradient back while the logits of a chunk are in memory, so they are
formed once: four products with a head in all, for the student, the teacher and two gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from seqkd.learner.teacher_distribution import FullTeacher, KnownTeacher, TopTeacher
from seqkd.models.output_head import (
    OutputHead,
    block_rows,
    blocks_of,
    chunk_rows,
    chunks_of,
    gather,
)
from seqkd.objectives import DIVERGENCES
from seqkd.types import Divergence, EndLogprob, Stat

STUDENT_ONLY = frozenset({"student_logprob", "entropy"})
STATS = ("student_logprob", "teacher_logprob", "reverse_kl", "forward_kl", "entropy")
MONITORED = {"reverse_kl": "token_reverse_kl", "forward_kl": "token_forward_kl"}
"""Divergences that have a name of their own, being reported whatever the objective."""


def token_stats(
    hidden: Tensor,
    head: OutputHead,
    targets: Tensor,
    names: tuple[Stat, ...],
    teacher: KnownTeacher | None = None,
    fused: bool = False,
) -> dict[Stat, Tensor]:
    """Per-token statistics, [N] float32 each, differentiable in ``hidden`` and ``head``; the
    backward pass forms the logits again.

    Args:
        hidden: [N, H] student states; targets: [N] the tokens drawn there.
        names: which of :data:`STATS`, divergences or :class:`seqkd.types.EndLogprob`; the first
            two need the teacher, but for :data:`STUDENT_ONLY`, and ``teacher_logprob`` needs a
            :class:`FullTeacher`.
        fused: what is done to logits is compiled first, as it always is on a GPU.

    Where one vocabulary is padded beyond the other, both are read up to the shorter.
    """
    if not names:
        return {}
    work = _Work(head, targets, names, teacher, fused)
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
    fused: bool = False,
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
    work = _Work(head, targets, names, teacher, fused)
    order = _from_the_end(position, group, head.weight)
    loss, *values = _Loss.apply(hidden, head.weight, head.bias, work, objective, order)
    return loss, dict(zip(names, values, strict=True))


def stats_of_logits(
    logits: Tensor, teacher_logits: Tensor, targets: Tensor, names: tuple[Stat, ...]
) -> dict[Stat, Tensor]:
    """The same from logits, [..., V] twice and [...]: for other trainers and small examples. Keeps
    whole [..., V] tensors for the backward pass."""
    student_logits, flat_teacher = logits.flatten(0, -2), teacher_logits.detach().flatten(0, -2)
    values = _statistics(student_logits, flat_teacher, targets.flatten(), names)
    return {name: value.view(targets.shape) for name, value in values.items()}


Block = tuple[Tensor, Tensor, Tensor | None]
"""Indices of n states, and [n, V] of student and teacher: products with their heads."""


@dataclass(frozen=True)
class _Work:
    head: OutputHead
    targets: Tensor
    names: tuple[Stat, ...]
    teacher: KnownTeacher | None
    fused: bool

    def chunks(
        self, hidden: Tensor, order: Sequence[Tensor], names: tuple[Stat, ...]
    ) -> Iterator[tuple[Tensor, Tensor, list[Block]]]:
        """A product after the other over the blocks of ``order``: indices of its states,
        :meth:`OutputHead.raw` of them ([n, V], gone with the next), and its blocks."""
        teacher = None if STUDENT_ONLY.issuperset(names) else self.teacher
        room, more = self.head.room(len(hidden)), None
        if isinstance(teacher, FullTeacher):
            more = teacher.head.weight.new_empty(len(room), len(teacher.head.weight))
        for chunk in chunks_of(order, self.head.weight):
            rows, sizes = torch.cat(chunk), list(map(len, chunk))
            raw = self.head.raw(hidden[rows], room)
            teacher_blocks: Sequence[Tensor | None] = [None] * len(chunk)
            if isinstance(teacher, FullTeacher):
                teacher_blocks = teacher.head.raw(teacher.hidden[rows], more).split(sizes)
            yield rows, raw, list(zip(chunk, raw.split(sizes), teacher_blocks, strict=True))

    def values(
        self, block: Block, learnt: tuple[Stat, ...], watched: tuple[Stat, ...] = ()
    ) -> dict[Stat, Tensor]:
        """[n] a name, of one block; ``learnt`` are differentiable in the student's part."""
        rows, raw, teacher_raw = block
        teacher = self.teacher.rows(rows) if isinstance(self.teacher, TopTeacher) else self.teacher
        read = _fused() if raw.is_cuda or self.fused else _read
        values = read(self.head, teacher, raw, teacher_raw, self.targets[rows], learnt, watched)
        return dict(zip(learnt + watched, values, strict=True))


def _read(
    head: OutputHead,
    teacher: KnownTeacher | None,
    raw: Tensor,
    teacher_raw: Tensor | None,
    targets: Tensor,
    learnt: tuple[Stat, ...],
    watched: tuple[Stat, ...],
) -> list[Tensor]:
    """Everything that is done to logits, element by element and row by row."""
    distribution: TopTeacher | Tensor | None = None
    if isinstance(teacher, TopTeacher):
        distribution = teacher
    elif teacher is not None and teacher_raw is not None:
        distribution = teacher.head.finish(teacher_raw)
    return list(_statistics(head.finish(raw), distribution, targets, learnt, watched).values())


@cache
def _fused() -> Callable[..., list[Tensor]]:
    """:func:`_read` as kernels that read the logits a few times in all, where operation by
    operation every one of some thirty would read and write them."""
    # Each objective and each way of measuring is a graph of its own; beyond a limit, 8 by default,
    # they would silently run operation by operation.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(_read)


Slopes = Mapping[Stat, Tensor]
"""[N] by name: the derivative of a loss by each statistic that it depends on."""


def _gradients(
    work: _Work,
    hidden: Tensor,
    needed: Sequence[bool],
    order: Sequence[Tensor],
    names: tuple[Stat, ...],
    slopes_at: Callable[[Tensor, Mapping[Stat, Tensor]], Slopes],
    watched: tuple[Stat, ...] = (),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of hidden states, weight and bias, where ``needed``: what is frozen costs nothing (the head
    of a student with adapters is). ``slopes_at`` is asked for each block of states in turn, whose
    statistics ``names`` and ``watched`` it is given."""
    weight, bias = work.head.weight, work.head.bias
    of_hidden = torch.zeros_like(hidden) if needed[0] else None
    # Float32 sums: many chunks are added, and bfloat16 would lose the small ones.
    of_weight = torch.zeros_like(weight, dtype=torch.float32) if needed[1] else None
    of_bias = (
        torch.zeros_like(bias, dtype=torch.float32) if needed[2] and bias is not None else None
    )

    def gradient(block: Block) -> Tensor:
        """[n, V] of one block's products."""
        rows, raw, teacher_raw = block
        raw = raw.detach().requires_grad_()
        with torch.enable_grad():
            values = work.values((rows, raw, teacher_raw), names, watched)
            slopes = slopes_at(rows, values)
            learnt, by = [values[name] for name in names], [slopes[name][rows] for name in names]
            return torch.autograd.grad(learnt, raw, by)[0]

    def add(rows: Tensor, raw: Tensor, blocks: list[Block]) -> None:
        """One chunk's; a function, so that nothing of it is held when the next one is formed."""
        if len(blocks) == 1:
            raw = gradient(blocks[0])
        else:  # in place of the products, which nobody reads again
            for block in blocks:
                block[1].copy_(gradient(block))
        if of_hidden is not None:
            of_hidden[rows] = (raw @ weight).to(hidden.dtype)
        if of_weight is not None:
            _add_product(of_weight, raw.T, hidden[rows].to(weight.dtype))
        if of_bias is not None:
            of_bias.add_(raw.sum(0, dtype=torch.float32))

    if names:
        for chunk in work.chunks(hidden, order, names + watched):
            add(*chunk)
    return (
        of_hidden,
        None if of_weight is None else of_weight.to(weight.dtype),
        None if of_bias is None or bias is None else of_bias.to(bias.dtype),
    )


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, with ``total`` and every sum in float32."""
    if a.dtype == torch.float32 or not a.is_cuda:
        total.addmm_(a.float(), b.float())
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


class _Statistics(torch.autograd.Function):
    """[N, H] -> one [N] tensor a name, recomputing each chunk's logits in the backward pass."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, work):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(hidden, weight, bias)
        ctx.work = work
        ctx.set_materialize_grads(False)
        out = {name: hidden.new_empty(len(hidden), dtype=torch.float32) for name in work.names}
        for *_, blocks in work.chunks(hidden, blocks_of(len(hidden), weight), work.names):
            for block in blocks:
                for name, value in work.values(block, work.names).items():
                    out[name][block[0]] = value
        return tuple(out[name] for name in work.names)

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        work: _Work = ctx.work
        hidden, weight, _ = ctx.saved_tensors
        slopes = {n: g for n, g in zip(work.names, grads, strict=True) if g is not None}
        slopes.pop("teacher_logprob", None)
        order = blocks_of(len(hidden), weight)
        needed, names = ctx.needs_input_grad, tuple(slopes)
        return (*_gradients(work, hidden, needed, order, names, lambda *_: slopes), None)


class _Loss(torch.autograd.Function):
    """[N, H] -> the loss, and one [N] tensor a name. The gradient is there when the forward pass
    ends."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, work, objective, order):  # type: ignore[no-untyped-def]
        totals = {n: hidden.new_zeros(len(hidden), dtype=torch.float32) for n in work.names}
        learnt = tuple(_slopes(objective, totals)[1])
        assert learnt, "an objective that depends on no statistic of the student"
        watched = tuple(name for name in work.names if name not in learnt)
        used = {name: torch.zeros_like(totals[name]) for name in learnt}

        def as_known_so_far(rows: Tensor, values: Mapping[Stat, Tensor]) -> Slopes:
            for name, value in values.items():
                totals[name][rows] = value.detach()
            slopes = _slopes(objective, totals)[1]
            for name in learnt:
                used[name][rows] = slopes[name][rows]
            return slopes

        gradients = _gradients(
            work, hidden, ctx.needs_input_grad, order, learnt, as_known_so_far, watched
        )
        loss, slopes = _slopes(objective, totals)
        if not all(_alike(used[name], slopes[name]) for name in learnt):
            gradients = _gradients(
                work, hidden, ctx.needs_input_grad, order, learnt, lambda *_: slopes
            )
        ctx.gradients = gradients
        outputs = tuple(totals[name] for name in work.names)
        ctx.mark_non_differentiable(*outputs)
        return (loss, *outputs)

    @staticmethod
    def backward(ctx, slope, *_):  # type: ignore[no-untyped-def]
        assert ctx.gradients, "a second backward pass: the first one has scaled the gradients"
        gradients, ctx.gradients = ctx.gradients, None
        return (*(None if g is None else g.mul_(slope) for g in gradients), None, None, None)


def _slopes(
    objective: Objective, values: Mapping[Stat, Tensor]
) -> tuple[Tensor, dict[Stat, Tensor]]:
    """The loss, and its derivative by each statistic that it depends on, [N]. The teacher's is
    none: it does not learn."""
    with torch.enable_grad():
        leaves = {
            name: value.detach().requires_grad_(name != "teacher_logprob")
            for name, value in values.items()
        }
        loss = objective(leaves)
    by = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    gradients = torch.autograd.grad(loss, list(by.values()), allow_unused=True)
    return loss.detach(), {n: g for n, g in zip(by, gradients, strict=True) if g is not None}


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether two slopes differ by rounding alone."""
    if not len(b):
        return True
    return bool((a - b).abs().max() <= 1e-5 * b.abs().max())


def _statistics(
    logits: Tensor,
    teacher: TopTeacher | Tensor | None,
    targets: Tensor,
    learnt: tuple[Stat, ...],
    watched: tuple[Stat, ...] = (),
) -> dict[Stat, Tensor]:
    """[n] a name, from logits, [n, V]; ``teacher`` as a tensor is its logits. Only what is
    ``learnt`` is differentiable."""
    if isinstance(teacher, Tensor):
        size = min(logits.shape[-1], teacher.shape[-1])
        logits, teacher = logits[:, :size], teacher[:, :size]
    log_q = torch.log_softmax(logits, -1)
    log_p = torch.log_softmax(teacher, -1) if isinstance(teacher, Tensor) else None

    def pair(temperature: float) -> tuple[Tensor, Tensor]:
        """Both over the same events, [n, V] or [n, k + 1] each."""
        if isinstance(teacher, TopTeacher):
            ids = teacher.ids.long()
            rest = log_q.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
            return torch.cat([log_q.gather(-1, ids), rest], -1), teacher.logprobs
        assert teacher is not None and log_p is not None
        if temperature == 1.0:
            return log_q, log_p
        return torch.log_softmax(logits / temperature, -1), torch.log_softmax(
            teacher / temperature, -1
        )

    values: dict[Stat, Tensor] = {}

    def value(name: Stat) -> Tensor:
        if isinstance(name, EndLogprob):
            return log_q[:, list(name.token_ids)].logsumexp(-1)
        if name == "student_logprob":
            return gather(log_q, targets)
        if name == "teacher_logprob":
            assert log_p is not None
            return gather(log_p, targets)
        if name == "entropy":
            return -(log_q.exp() * log_q).sum(-1)
        divergence_kind = name if isinstance(name, Divergence) else Divergence(MONITORED[name])
        if divergence_kind in values:  # the objective's own is reported too
            return values[divergence_kind]
        options = () if divergence_kind.coefficient is None else (divergence_kind.coefficient,)
        divergence = DIVERGENCES[divergence_kind.kind](*pair(divergence_kind.temperature), *options)
        return divergence * divergence_kind.temperature**2

    for name in learnt:
        values[name] = value(name)
    with torch.no_grad():
        for name in watched:
            values[name] = value(name)
    return values


def _from_the_end(position: Tensor, group: Tensor, weight: Tensor) -> list[Tensor]:
    """Indices of all states from the last position to the first, block by block: the samples of a
    prompt at one position are in one, unless they alone are more than a chunk."""
    key = group - position * (int(group.max()) + 1 if len(group) else 1)
    order = key.argsort(stable=True)
    _, counts = torch.unique_consecutive(key[order], return_counts=True)
    sizes = [0]
    for count in counts.tolist():
        if sizes[-1] and sizes[-1] + count > block_rows(weight):
            sizes.append(0)
        sizes[-1] += count
    most = chunk_rows(weight)
    return [part for whole in order.split(sizes) for part in whole.split(most) if len(part)]
