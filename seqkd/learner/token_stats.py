"""Per-token log-probabilities and divergences, and losses of them, from hidden states and output
heads.

The logits of a few hundred tokens at a time are computed, reduced to one number per token, block by
block, and discarded. Peak memory is two [chunk, V] tensors and some [block, V] tensors (see
:mod:`seqkd.models.output_head`), so it grows with N and never with N x V. A loss
(:func:`token_loss`) backpropagates while the logits of a chunk are in memory, so the logits are
computed only once. This takes four matrix products with a head: for the student, the teacher and
two gradients.
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
from seqkd.objectives.divergences import graded_kl, without
from seqkd.types import Divergence, EndStat, Stat

STUDENT_ONLY = frozenset({"student_logprob", "entropy"})
STATS = ("student_logprob", "teacher_logprob", "reverse_kl", "forward_kl", "entropy")
MONITORED = {"reverse_kl": "token_reverse_kl", "forward_kl": "token_forward_kl"}
"""Divergences that are reported for every objective, by the name of the statistic."""


def token_stats(
    hidden: Tensor,
    head: OutputHead,
    targets: Tensor,
    names: tuple[Stat, ...],
    teacher: KnownTeacher | None = None,
    fused: bool = False,
) -> dict[Stat, Tensor]:
    """Compute per-token statistics, differentiable in ``hidden`` and ``head``. The backward pass
    computes the logits again.

    If one vocabulary is padded to a larger size than the other, both are cut to the smaller size.

    Args:
        hidden: [N, H] student states.
        head: Output head of the student.
        targets: [N] tokens that were sampled at the states.
        names: Names from :data:`STATS`, divergences or :class:`seqkd.types.EndStat`. Divergences,
            ``graded_kl`` and the names that are not in :data:`STUDENT_ONLY` need the teacher.
            ``teacher_logprob`` and ``graded_kl`` need a :class:`FullTeacher`.
        teacher: The teacher's distributions.
        fused: Compile the operations on logits. On a GPU they are always compiled.

    Returns:
        [N] float32 for every name.
    """
    if not names:
        return {}
    work = _Work(head, targets, names, teacher, fused)
    values = _Statistics.apply(hidden, head.weight, head.bias, work)
    return dict(zip(names, values, strict=True))


Objective = Callable[[Mapping[Stat, Tensor]], Tensor]
"""Function of [N] float32 statistics, by name, that returns the scalar to minimize."""


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
    """Compute the loss ``objective(statistics)``, differentiable in ``hidden`` and ``head``, and
    the statistics of :func:`token_stats`, which are not differentiable.

    The states are processed from the last ``position`` ([N], within the completion) to the first,
    the states of one ``group`` ([N], the samples of one prompt) together. The gradient of a chunk
    is backpropagated at once. At that time the derivative of the objective by a state's statistics
    has to be computed without the statistics of earlier states. It is correct for every objective
    that depends only on a token and its future, such as returns with a leave-one-out baseline.

    At the end, these derivatives are compared with the derivatives that follow from all statistics.
    If they differ (the return of the whole sequence, an importance weight of the sequence), the
    gradient is computed again with the correct derivatives. The result is exact for every
    objective, with six matrix products with a head instead of four.
    """
    work = _Work(head, targets, names, teacher, fused)
    order = _from_the_end(position, group, head.weight)
    loss, *values = _Loss.apply(hidden, head.weight, head.bias, work, objective, order)
    return loss, dict(zip(names, values, strict=True))


def stats_of_logits(
    logits: Tensor, teacher_logits: Tensor, targets: Tensor, names: tuple[Stat, ...]
) -> dict[Stat, Tensor]:
    """Compute the statistics of :func:`token_stats` from logits, for other trainers and small
    examples. Keeps complete [..., V] tensors for the backward pass.

    Args:
        logits: [..., V] student logits.
        teacher_logits: [..., V] teacher logits.
        targets: [...] token ids.
        names: Names of the statistics.

    Returns:
        [...] for every name.
    """
    student_logits, flat_teacher = logits.flatten(0, -2), teacher_logits.detach().flatten(0, -2)
    values = _statistics(student_logits, flat_teacher, targets.flatten(), names)
    return {name: value.view(targets.shape) for name, value in values.items()}


Block = tuple[Tensor, Tensor, Tensor | None]
"""Indices of n states, and the [n, V] products of the student's and the teacher's head with
them."""


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
        """Compute one matrix product after the other over the blocks of ``order``.

        Yields the indices of the product's states, their :meth:`OutputHead.raw` ([n, V],
        overwritten by the next product), and its blocks.
        """
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
        self, block: Block, differentiable: tuple[Stat, ...], monitored: tuple[Stat, ...] = ()
    ) -> dict[Stat, Tensor]:
        """Return the statistics of one block, [n] for every name. Only the ``differentiable``
        statistics are differentiable in the student's logits."""
        rows, raw, teacher_raw = block
        teacher = self.teacher.rows(rows) if isinstance(self.teacher, TopTeacher) else self.teacher
        read = _fused() if raw.is_cuda or self.fused else _read
        values = read(
            self.head, teacher, raw, teacher_raw, self.targets[rows], differentiable, monitored
        )
        return dict(zip(differentiable + monitored, values, strict=True))


def _read(
    head: OutputHead,
    teacher: KnownTeacher | None,
    raw: Tensor,
    teacher_raw: Tensor | None,
    targets: Tensor,
    differentiable: tuple[Stat, ...],
    monitored: tuple[Stat, ...],
) -> list[Tensor]:
    """Apply all elementwise and rowwise operations to logits."""
    distribution: TopTeacher | Tensor | None = None
    if isinstance(teacher, TopTeacher):
        distribution = teacher
    elif teacher is not None and teacher_raw is not None:
        distribution = teacher.head.finish(teacher_raw)
    return list(
        _statistics(head.finish(raw), distribution, targets, differentiable, monitored).values()
    )


@cache
def _fused() -> Callable[..., list[Tensor]]:
    """Compile :func:`_read`. The compiled kernels read the logits only a few times. Without
    compilation, each of some thirty operations would read and write them."""
    # Every objective and every set of statistics is a separate graph. Beyond the limit, 8 by
    # default, further graphs would silently run without compilation.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(_read)


Slopes = Mapping[Stat, Tensor]
"""Derivatives of a loss by the statistics that it depends on, [N] for every name."""


def _gradients(
    work: _Work,
    hidden: Tensor,
    needed: Sequence[bool],
    order: Sequence[Tensor],
    names: tuple[Stat, ...],
    slopes_at: Callable[[Tensor, Mapping[Stat, Tensor]], Slopes],
    monitored: tuple[Stat, ...] = (),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute the gradients of hidden states, weight and bias that are ``needed``.

    Gradients of frozen tensors, such as the head of a student with adapters, are not computed.
    ``slopes_at`` is called once for every block of states, with the statistics ``names`` and
    ``monitored``.
    """
    weight, bias = work.head.weight, work.head.bias
    hidden_grad = torch.zeros_like(hidden) if needed[0] else None
    # Float32 sums, because in bfloat16 the small contributions of many chunks would be lost.
    weight_grad = torch.zeros_like(weight, dtype=torch.float32) if needed[1] else None
    bias_grad = (
        torch.zeros_like(bias, dtype=torch.float32) if needed[2] and bias is not None else None
    )

    def gradient(block: Block) -> Tensor:
        """Return the [n, V] gradient of one block's products."""
        rows, raw, teacher_raw = block
        raw = raw.detach().requires_grad_()
        with torch.enable_grad():
            values = work.values((rows, raw, teacher_raw), names, monitored)
            slopes = slopes_at(rows, values)
            outputs = [values[name] for name in names]
            return torch.autograd.grad(outputs, raw, [slopes[name][rows] for name in names])[0]

    def add(rows: Tensor, raw: Tensor, blocks: list[Block]) -> None:
        """Add the gradients of one chunk. This is a function so that its local tensors are freed
        before the next chunk is computed."""
        if len(blocks) == 1:
            raw = gradient(blocks[0])
        else:  # overwrite the products, which are not read again
            for block in blocks:
                block[1].copy_(gradient(block))
        if hidden_grad is not None:
            hidden_grad[rows] = (raw @ weight).to(hidden.dtype)
        if weight_grad is not None:
            _add_product(weight_grad, raw.T, hidden[rows].to(weight.dtype))
        if bias_grad is not None:
            bias_grad.add_(raw.sum(0, dtype=torch.float32))

    if names:
        for chunk in work.chunks(hidden, order, names + monitored):
            add(*chunk)
    return (
        hidden_grad,
        None if weight_grad is None else weight_grad.to(weight.dtype),
        None if bias_grad is None or bias is None else bias_grad.to(bias.dtype),
    )


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Compute total += a @ b, with ``total`` and all sums in float32."""
    if a.dtype == torch.float32 or not a.is_cuda:
        total.addmm_(a.float(), b.float())
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


class _Statistics(torch.autograd.Function):
    """Statistics of [N, H] states, one [N] tensor per name. The backward pass recomputes the logits
    of every chunk."""

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
    """Loss and statistics of [N, H] states, one [N] tensor per name. The gradient is computed
    during the forward pass."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, work, objective, order):  # type: ignore[no-untyped-def]
        totals = {n: hidden.new_zeros(len(hidden), dtype=torch.float32) for n in work.names}
        differentiable = tuple(_slopes(objective, totals)[1])
        assert differentiable, "the objective does not depend on any statistic of the student"
        monitored = tuple(name for name in work.names if name not in differentiable)
        used = {name: torch.zeros_like(totals[name]) for name in differentiable}

        def slopes_so_far(rows: Tensor, values: Mapping[Stat, Tensor]) -> Slopes:
            for name, value in values.items():
                totals[name][rows] = value.detach()
            slopes = _slopes(objective, totals)[1]
            for name in differentiable:
                used[name][rows] = slopes[name][rows]
            return slopes

        gradients = _gradients(
            work, hidden, ctx.needs_input_grad, order, differentiable, slopes_so_far, monitored
        )
        loss, slopes = _slopes(objective, totals)
        if not all(_alike(used[name], slopes[name]) for name in differentiable):
            gradients = _gradients(
                work, hidden, ctx.needs_input_grad, order, differentiable, lambda *_: slopes
            )
        ctx.gradients = gradients
        outputs = tuple(totals[name] for name in work.names)
        ctx.mark_non_differentiable(*outputs)
        return (loss, *outputs)

    @staticmethod
    def backward(ctx, slope, *_):  # type: ignore[no-untyped-def]
        assert ctx.gradients, "second backward pass: the first one scaled the gradients in place"
        gradients, ctx.gradients = ctx.gradients, None
        return (*(None if g is None else g.mul_(slope) for g in gradients), None, None, None)


def _slopes(
    objective: Objective, values: Mapping[Stat, Tensor]
) -> tuple[Tensor, dict[Stat, Tensor]]:
    """Return the loss and its derivatives by the statistics that it depends on, [N] for every name.
    There is no derivative by ``teacher_logprob``, because the teacher is not trained."""
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
    """Return True if two slopes are equal up to rounding."""
    if not len(b):
        return True
    return bool((a - b).abs().max() <= 1e-5 * b.abs().max())


def _statistics(
    logits: Tensor,
    teacher: TopTeacher | Tensor | None,
    targets: Tensor,
    differentiable: tuple[Stat, ...],
    monitored: tuple[Stat, ...] = (),
) -> dict[Stat, Tensor]:
    """Compute statistics, [n] for every name, from [n, V] logits.

    ``teacher`` is a tensor of the teacher's logits or its most probable tokens. Only the statistics
    in ``differentiable`` are differentiable.
    """
    if isinstance(teacher, Tensor):
        size = min(logits.shape[-1], teacher.shape[-1])
        logits, teacher = logits[:, :size], teacher[:, :size]
    log_q = torch.log_softmax(logits, -1)
    log_p = torch.log_softmax(teacher, -1) if isinstance(teacher, Tensor) else None

    def pair(temperature: float) -> tuple[Tensor, Tensor]:
        """Return the log-probs of student and teacher over the same events, both [n, V] or both
        [n, k + 1]."""
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
        if isinstance(name, EndStat):
            ends = torch.tensor(name.token_ids, device=targets.device)
            if name.name == "end_logprob":
                return log_q[:, ends].logsumexp(-1)
            if name.name == "content_logprob":
                content = gather(log_q, targets) - without(log_q, ends).logsumexp(-1)
                return torch.where(torch.isin(targets, ends), 0.0, content)
            assert log_p is not None
            return graded_kl(log_q, log_p, ends)
        if name == "student_logprob":
            return gather(log_q, targets)
        if name == "teacher_logprob":
            assert log_p is not None
            return gather(log_p, targets)
        if name == "entropy":
            return -(log_q.exp() * log_q).sum(-1)
        divergence_kind = name if isinstance(name, Divergence) else Divergence(MONITORED[name])
        if divergence_kind in values:  # the objective's own divergence is also monitored
            return values[divergence_kind]
        options = () if divergence_kind.coefficient is None else (divergence_kind.coefficient,)
        divergence = DIVERGENCES[divergence_kind.kind](*pair(divergence_kind.temperature), *options)
        return divergence * divergence_kind.temperature**2

    for name in differentiable:
        values[name] = value(name)
    with torch.no_grad():
        for name in monitored:
            values[name] = value(name)
    return values


def _from_the_end(position: Tensor, group: Tensor, weight: Tensor) -> list[Tensor]:
    """Return the indices of all states in blocks, from the last position to the first. The samples
    of a prompt at one position are in the same block, unless they exceed a chunk."""
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
