"""Packing of rollouts and teacher scores into micro-batches. No other module shifts tokens by one.

The state before completion token t of a prompt of length P is at position P + t - 1.

A row is one sequence, or a prompt followed by the completions of all its samples. In the second
case a completion attends only to the prompt and to itself, and the prompt is computed once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from seqkd.types import Rollout, TeacherScore, TrainBatch


@dataclass(frozen=True)
class Layout:
    """Rules for the arrangement of rollouts in rows and micro-batches."""

    tokens: int
    """Maximum number of padded tokens in a micro-batch, unless the samples of one prompt have
    more."""
    sharing: int = 0
    """Number of token pairs in one layer's attention that cost as much as one token in the layer's
    matrices. A prompt is shared if that is cheaper. 0: never."""

    def rows(self, group: Sequence[Rollout]) -> list[Sequence[Rollout]]:
        """Arrange the samples of one prompt in rows.

        In a shared row the prompt is computed only once, but attention compares every token of the
        row with every other token.
        """
        lengths = [len(fed_tokens(r)) for r in group]
        saved = (len(group) - 1) * len(group[0].prompt_ids)
        compared = (sum(lengths) - saved) ** 2 - sum(n**2 for n in lengths)
        pays = self.sharing and saved * self.sharing > compared
        return [group] if pays else [[r] for r in group]


def partition(
    rollouts: Iterable[Rollout], scores: Mapping[str, TeacherScore], ranks: int, layout: Layout
) -> list[list[list[Rollout]]]:
    """Distribute rollouts over ranks and micro-batches; the result is indexed [rank][micro-batch].

    - The samples of a prompt stay together.
    - A micro-batch contains prompts of similar length, all with the same teacher.
    - Every rank gets the same number of micro-batches, as collective operations require. The last
      micro-batches of a rank may be empty.
    """
    groups: dict[tuple[str, str], list[Rollout]] = {}
    for rollout in rollouts:
        teacher = scores[rollout.sample_id].teacher if scores else ""
        groups.setdefault((teacher, rollout.prompt_id), []).append(rollout)
    sized = [
        ([_length(row) for row in layout.rows(group_rollouts)], t, group_rollouts)
        for (t, _), group_rollouts in groups.items()
    ]
    assigned: list[list[tuple[list[int], str, list[Rollout]]]] = [[] for _ in range(ranks)]
    # The largest group goes first, to the rank with the smallest load, so that no rank stays empty
    # if there are enough groups.
    loads = [0] * ranks
    for one in sorted(sized, key=lambda one: -sum(one[0])):
        rank = loads.index(min(loads))
        loads[rank] += sum(one[0])
        assigned[rank].append(one)
    teachers = dict.fromkeys(teacher for teacher, _ in groups)
    plan = [
        [slot for teacher in teachers for slot in _fill(_by_length(teacher, own), layout.tokens)]
        for own in assigned
    ]
    most = max(map(len, plan))
    return [slots + [[]] * (most - len(slots)) for slots in plan]


def _by_length(
    teacher: str, assigned: list[tuple[list[int], str, list[Rollout]]]
) -> list[tuple[list[int], list[Rollout]]]:
    """Return the groups of one teacher, the group with the longest row first."""
    own = [(lengths, group) for lengths, name, group in assigned if name == teacher]
    return sorted(own, key=lambda one: -max(one[0]))


def _fill(sized: list[tuple[list[int], list[Rollout]]], tokens: int) -> list[list[Rollout]]:
    """Fill micro-batches with groups, which are sorted by the length of their longest row."""
    slots: list[list[Rollout]] = []
    rows = longest = 0
    for lengths, group in sized:
        if not slots or (rows + len(lengths)) * longest > tokens:
            slots.append([])
            rows, longest = 0, max(lengths)
        slots[-1] += group
        rows += len(lengths)
    return slots


def _length(row: Sequence[Rollout]) -> int:
    return len(row[0].prompt_ids) + sum(len(r.completion_ids) - 1 for r in row)


def fed_tokens(rollout: Rollout) -> list[int]:
    """Return the model's input: the prompt and the completion without its last token, which
    predicts nothing."""
    return [*rollout.prompt_ids, *rollout.completion_ids[:-1]]


def state_span(rollout: Rollout) -> slice:
    """Return the positions in :func:`fed_tokens` of the states before the completion tokens."""
    return slice(len(rollout.prompt_ids) - 1, None)


def padded(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Pad sequences on the right. Returns token ids and attention mask, [B, S] long."""
    ids = _pad([torch.tensor(s) for s in sequences])
    mask = _pad([torch.ones(len(s), dtype=torch.long) for s in sequences])
    return ids, mask


def pack(
    rollouts: Sequence[Rollout],
    scores: Mapping[str, TeacherScore],
    filler: Rollout,
    layout: Layout,
) -> TrainBatch:
    """Pack rollouts into one right-padded micro-batch.

    An empty micro-batch contains ``filler`` with a loss mask of zeros. ``scores`` is empty (no
    teacher needed) or has an entry for every rollout.
    """
    padded_rollouts = list(rollouts) or [filler]
    groups: dict[str, list[Rollout]] = {}
    for r in padded_rollouts:
        groups.setdefault(r.prompt_id, []).append(r)
    rows = [row for group in groups.values() for row in layout.rows(group)]
    where = {r.sample_id: place for i, row in enumerate(rows) for r, place in _places(i, row)}
    target_ids = _pad([torch.tensor(r.completion_ids) for r in padded_rollouts])
    loss_mask = _pad([torch.ones(len(r.completion_ids), dtype=torch.bool) for r in padded_rollouts])
    numbers = {prompt_id: i for i, prompt_id in enumerate(groups)}
    batch = TrainBatch(
        **_laid_out(rows),
        state_row=torch.tensor([where[r.sample_id][0] for r in padded_rollouts]),
        state_index=_pad([where[r.sample_id][1] for r in padded_rollouts]),
        target_ids=target_ids,
        loss_mask=loss_mask,
        group=torch.tensor([numbers[r.prompt_id] for r in padded_rollouts]),
        rollout_logprobs=_padded_logprobs(padded_rollouts),
        by_teacher=torch.tensor([r.source == "teacher" for r in padded_rollouts]),
        sample_ids=tuple(r.sample_id for r in rollouts),
    )
    present_scores = [scores[r.sample_id] for r in rollouts] if scores else []
    if not rollouts:
        batch = replace(batch, loss_mask=torch.zeros_like(loss_mask))
        # Tensors without rows but with the usual widths, so that all ranks run the same code.
        present_scores = [s.map_tensors(lambda t: t[:0]) for s in list(scores.values())[:1]]
    return _with_scores(batch, present_scores) if present_scores else batch


def _places(number: int, row: Sequence[Rollout]) -> Iterator[tuple[Rollout, tuple[int, Tensor]]]:
    """Yield every rollout of row ``number`` with the position of the states before its completion
    tokens: (row, [T] positions in the row)."""
    prompt = len(row[0].prompt_ids)
    begins = prompt
    for r in row:
        after = torch.arange(begins, begins + len(r.completion_ids) - 1)
        yield r, (number, torch.cat([torch.tensor([prompt - 1]), after]))
        begins += len(after)


def _laid_out(rows: Sequence[Sequence[Rollout]]) -> dict[str, Any]:
    """Return the fields of a :class:`seqkd.types.TrainBatch` that are the model's input."""
    ids, mask = padded(
        [[*row[0].prompt_ids, *(t for r in row for t in r.completion_ids[:-1])] for row in rows]
    )
    tokens: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if all(len(row) == 1 for row in rows):
        return tokens | {"position_ids": None, "segment": None}
    parts = [_parts(row) for row in rows]
    positions = [torch.cat([torch.arange(start, start + n) for _, start, n in p]) for p in parts]
    segments = [torch.cat([torch.full((n,), s) for s, _, n in p]) for p in parts]
    return tokens | {"position_ids": _pad(positions), "segment": _pad(segments)}


def _parts(row: Sequence[Rollout]) -> list[tuple[int, int, int]]:
    """Return (segment, first position, number of tokens) of the prompt (segment 0) and of every
    completion (segments 1, 2, ...)."""
    prompt = len(row[0].prompt_ids)
    completions = [(i, prompt, len(r.completion_ids) - 1) for i, r in enumerate(row, 1)]
    return [(0, 0, prompt), *completions]


def _with_scores(batch: TrainBatch, scores: list[TeacherScore]) -> TrainBatch:
    """Add scores to a micro-batch. They are from one teacher and thus have the same fields."""
    (teacher,) = {score.teacher for score in scores}

    def flat(name: str) -> Tensor | None:
        rows = [getattr(score, name) for score in scores]
        if rows[0] is None:
            return None
        lengths = batch.loss_mask.sum(1).tolist()
        assert list(map(len, rows)) == lengths, "a score for every completion token"
        return torch.cat(rows)

    logprobs = None
    if (flat_logprobs := flat("logprobs")) is not None:
        logprobs = torch.zeros(batch.loss_mask.shape).masked_scatter(batch.loss_mask, flat_logprobs)
    return replace(
        batch,
        teacher=teacher,
        teacher_hidden=flat("hidden"),
        teacher_logprobs=logprobs,
        teacher_top_ids=flat("top_ids"),
        teacher_top_logprobs=flat("top_logprobs"),
    )


def to_device(batch: TrainBatch, device: torch.device | str) -> TrainBatch:
    """Return the micro-batch with all tensors on ``device``."""
    return batch.map_tensors(lambda tensor: tensor.to(device))


def _padded_logprobs(rows: list[Rollout]) -> Tensor | None:
    logprob_rows = [r.rollout_logprobs for r in rows if r.rollout_logprobs is not None]
    if len(logprob_rows) < len(rows):
        return None
    return _pad([torch.tensor(logprobs, dtype=torch.float32) for logprobs in logprob_rows])


def _pad(rows: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
