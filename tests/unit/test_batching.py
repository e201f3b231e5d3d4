"""The shift by one, padding, and that groups are never split."""

from __future__ import annotations

import pytest
import torch

from seqkd import batching
from seqkd.types import Rollout, TeacherScore


def rollout(prompt_id, index, prompt, completion, source="student"):
    return Rollout(
        prompt_id,
        f"{prompt_id}/{index}",
        tuple(prompt),
        tuple(completion),
        tuple(-0.5 * (t + 1) for t in range(len(completion))),
        source,
        0,
        "stop",
    )


A = rollout("a", 0, [10, 11], [20, 21, 22])
B = rollout("b", 0, [12, 13, 14, 15], [23])


def test_states_stand_before_their_tokens():
    """Token t of the completion is predicted at the position of the token before it."""
    batch = batching.pack([A, B], {}, A)
    for row, r in enumerate((A, B)):
        sequence = [*r.prompt_ids, *r.completion_ids]
        for t, token in enumerate(r.completion_ids):
            position = batch.state_index[row, t].item()
            assert sequence[position + 1] == token == batch.target_ids[row, t]
            assert batch.input_ids[row, position] == sequence[position]
            assert batch.attention_mask[row, position] == 1


def test_padding_is_masked():
    batch = batching.pack([A, B], {}, A)
    assert batch.loss_mask.tolist() == [[True] * 3, [True, False, False]]
    assert batch.attention_mask.sum(1).tolist() == [4, 4]
    assert batch.rollout_logprobs[1].tolist() == [-0.5, 0, 0]
    assert batch.sample_ids == ("a/0", "b/0")


def test_a_scorer_sees_the_same_states():
    """state_span cut from per-token states gives the states that state_index names."""
    states = torch.arange(4.0)[:, None]
    assert batching.fed_tokens(A) == [10, 11, 20, 21]
    assert states[batching.state_span(A)].squeeze(1).tolist() == [1, 2, 3]
    assert batching.pack([A], {}, A).state_index.tolist() == [[1, 2, 3]]


def test_teacher_states_follow_the_mask():
    scores = {
        A.sample_id: TeacherScore(A.sample_id, hidden=torch.full((3, 2), 1.0)),
        B.sample_id: TeacherScore(B.sample_id, hidden=torch.full((1, 2), 2.0)),
    }
    batch = batching.pack([A, B], scores, A)
    rows, _ = batch.loss_mask.nonzero(as_tuple=True)
    assert batch.teacher_hidden[:, 0].tolist() == [1.0 if row == 0 else 2.0 for row in rows]


def test_a_score_of_another_length_is_refused():
    with pytest.raises(AssertionError):
        batching.pack([A], {A.sample_id: TeacherScore(A.sample_id, hidden=torch.zeros(2, 2))}, A)


def test_an_empty_micro_batch_teaches_nothing():
    scores = {A.sample_id: TeacherScore(A.sample_id, hidden=torch.zeros(3, 7))}
    batch = batching.pack([], scores, A)
    assert batch.loss_mask.sum() == 0
    assert batch.teacher_hidden.shape == (0, 7)
    assert batch.sample_ids == ()


def test_data_set_answers_have_no_rollout_logprobs():
    given = Rollout("d", "d/0", (1,), (2, 3), None, "dataset", 0, "stop")
    assert batching.pack([given], {}, given).rollout_logprobs is None


@pytest.mark.parametrize(("ranks", "per_micro_batch"), [(1, 1), (2, 1), (2, 3), (3, 2)])
def test_partition_keeps_groups_and_loses_nothing(ranks, per_micro_batch):
    rollouts = [
        rollout(f"p{p}", i, [1] * (p + 1), [2] * (i + 1)) for p in range(7) for i in range(3)
    ]
    plan = batching.partition(rollouts, {}, ranks, per_micro_batch)
    assert len(plan) == ranks
    assert len({len(part) for part in plan}) == 1, "the same number of micro-batches a rank"
    micro_batches = [m for part in plan for m in part]
    assert sorted(r.sample_id for m in micro_batches for r in m) == sorted(
        r.sample_id for r in rollouts
    )
    for p in range(7):
        assert sum(any(r.prompt_id == f"p{p}" for r in m) for m in micro_batches) == 1
    assert all(len({r.prompt_id for r in m}) <= per_micro_batch for m in micro_batches)
