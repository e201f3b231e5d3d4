"""Rollouts and teacher scores -> micro-batches. The only place that shifts by one.

The state before completion token t of a prompt of length P stands at position P + t - 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from seqkd.types import Rollout, TeacherScore, TrainBatch


def partition(
    rollouts: Iterable[Rollout],
    scores: Mapping[str, TeacherScore],
    ranks: int,
    prompts_per_micro_batch: int,
) -> list[list[list[Rollout]]]:
    """[rank][micro-batch] -> rollouts. The samples of a prompt stay together, prompts of similar
    length share a micro-batch, which is of one teacher, and every rank gets the same number of
    micro-batches (collective operations need that); trailing ones may be empty."""
    groups: dict[tuple[str, str], list[Rollout]] = {}
    for rollout in rollouts:
        teacher = scores[rollout.sample_id].teacher if scores else ""
        groups.setdefault((teacher, rollout.prompt_id), []).append(rollout)
    slots = []
    for teacher in dict.fromkeys(teacher for teacher, _ in groups):
        ordered = sorted(
            (group for (of, _), group in groups.items() if of == teacher),
            key=lambda group: -max(map(_length, group)),
        )
        slots += [
            [rollout for group in ordered[low : low + prompts_per_micro_batch] for rollout in group]
            for low in range(0, len(ordered), prompts_per_micro_batch)
        ]
    slots += [[] for _ in range(-len(slots) % ranks)]
    return [slots[rank::ranks] for rank in range(ranks)]


def fed_tokens(rollout: Rollout) -> list[int]:
    """What a scorer reads: prompt and completion without the last token, which predicts nothing."""
    return [*rollout.prompt_ids, *rollout.completion_ids[:-1]]


def state_span(rollout: Rollout) -> slice:
    """Where in :func:`fed_tokens` the states before each completion token stand."""
    return slice(len(rollout.prompt_ids) - 1, None)


def padded(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, [B, S] long, right-padded."""
    ids = _pad([torch.tensor(s) for s in sequences])
    mask = _pad([torch.ones(len(s), dtype=torch.long) for s in sequences])
    return ids, mask


def pack(
    rollouts: Sequence[Rollout], scores: Mapping[str, TeacherScore], filler: Rollout
) -> TrainBatch:
    """One right-padded micro-batch. An empty one becomes ``filler`` with nothing to learn.

    ``scores`` is empty (no teacher needed) or has an entry for every rollout.
    """
    rows = list(rollouts) or [filler]
    prompts = {prompt_id: i for i, prompt_id in enumerate(dict.fromkeys(r.prompt_id for r in rows))}
    input_ids, attention_mask = padded([fed_tokens(r) for r in rows])
    target_ids = _pad([torch.tensor(r.completion_ids) for r in rows])
    loss_mask = _pad([torch.ones(len(r.completion_ids), dtype=torch.bool) for r in rows])
    starts = torch.tensor([state_span(r).start for r in rows])
    state_index = (starts[:, None] + torch.arange(target_ids.shape[1])) * loss_mask
    batch = TrainBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        state_index=state_index,
        target_ids=target_ids,
        loss_mask=loss_mask,
        group=torch.tensor([prompts[r.prompt_id] for r in rows]),
        rollout_logprobs=_padded_logprobs(rows),
        by_teacher=torch.tensor([r.source == "teacher" for r in rows]),
        sample_ids=tuple(r.sample_id for r in rollouts),
    )
    given = [scores[r.sample_id] for r in rollouts] if scores else []
    if not rollouts:
        batch = replace(batch, loss_mask=torch.zeros_like(loss_mask))
        # No state, but tensors of the widths that the others have: all ranks run the same code.
        given = [_nothing(next(iter(scores.values())))] if scores else []
    return _with_scores(batch, given) if given else batch


def _with_scores(batch: TrainBatch, scores: list[TeacherScore]) -> TrainBatch:
    """Scores are of one teacher, and so of one form."""
    (teacher,) = {score.teacher for score in scores}

    def flat(name: str) -> Tensor | None:
        rows = [getattr(score, name) for score in scores]
        if rows[0] is None:
            return None
        lengths = batch.loss_mask.sum(1).tolist()
        assert list(map(len, rows)) == lengths, "a score for every completion token"
        return torch.cat(rows)

    logprobs = None
    if (every := flat("logprobs")) is not None:
        logprobs = torch.zeros(batch.loss_mask.shape).masked_scatter(batch.loss_mask, every)
    return replace(
        batch,
        teacher=teacher,
        teacher_hidden=flat("hidden"),
        teacher_logprobs=logprobs,
        teacher_top_ids=flat("top_ids"),
        teacher_top_logprobs=flat("top_logprobs"),
    )


def _nothing(score: TeacherScore) -> TeacherScore:
    """A score of no tokens, in the form of ``score``."""
    values = {f.name: getattr(score, f.name) for f in fields(score)}
    nothing: dict[str, Any] = {n: v[:0] for n, v in values.items() if isinstance(v, Tensor)}
    return replace(score, **nothing)


def _padded_logprobs(rows: list[Rollout]) -> Tensor | None:
    given = [r.rollout_logprobs for r in rows if r.rollout_logprobs is not None]
    if len(given) < len(rows):
        return None
    return _pad([torch.tensor(logprobs, dtype=torch.float32) for logprobs in given])


def _length(rollout: Rollout) -> int:
    return len(rollout.prompt_ids) + len(rollout.completion_ids)


def _pad(rows: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
