"""Micro-batches: the shift by one, padding, and complete groups."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from seqkd.learner import batching
from seqkd.learner.student import prefix_shared_mask, prefix_sharing_factor
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


ALONE, SHARED = batching.Layout(1), batching.Layout(1, sharing=10**9)
A = rollout("a", 0, [10, 11], [20, 21, 22])
B = rollout("b", 0, [12, 13, 14, 15], [23])


def test_states_are_at_the_position_before_their_tokens():
    """Token t of a completion is predicted at the position of the token before it."""
    batch = batching.pack([A, B], {}, A, ALONE)
    for row, r in enumerate((A, B)):
        sequence = [*r.prompt_ids, *r.completion_ids]
        for t, token in enumerate(r.completion_ids):
            position = batch.state_index[row, t].item()
            assert sequence[position + 1] == token == batch.target_ids[row, t]
            assert batch.input_ids[row, position] == sequence[position]
            assert batch.attention_mask[row, position] == 1


def test_padding_is_masked():
    batch = batching.pack([A, B], {}, A, ALONE)
    assert batch.loss_mask.tolist() == [[True] * 3, [True, False, False]]
    assert batch.attention_mask.sum(1).tolist() == [4, 4]
    assert batch.rollout_logprobs[1].tolist() == [-0.5, 0, 0]
    assert batch.sample_ids == ("a/0", "b/0")


def test_a_scorer_uses_the_same_states():
    """state_span selects the same states as state_index."""
    states = torch.arange(4.0)[:, None]
    assert batching.fed_tokens(A) == [10, 11, 20, 21]
    assert states[batching.state_span(A)].squeeze(1).tolist() == [1, 2, 3]
    assert batching.pack([A], {}, A, ALONE).state_index.tolist() == [[1, 2, 3]]


def test_teacher_states_are_in_the_order_of_the_mask():
    scores = {
        A.sample_id: TeacherScore(A.sample_id, hidden=torch.full((3, 2), 1.0)),
        B.sample_id: TeacherScore(B.sample_id, hidden=torch.full((1, 2), 2.0)),
    }
    batch = batching.pack([A, B], scores, A, ALONE)
    rows, _ = batch.loss_mask.nonzero(as_tuple=True)
    assert batch.teacher_hidden[:, 0].tolist() == [1.0 if row == 0 else 2.0 for row in rows]


def test_a_score_of_another_length_is_rejected():
    with pytest.raises(AssertionError):
        batching.pack(
            [A], {A.sample_id: TeacherScore(A.sample_id, hidden=torch.zeros(2, 2))}, A, ALONE
        )


def test_an_empty_micro_batch_has_no_loss():
    scores = {A.sample_id: TeacherScore(A.sample_id, hidden=torch.zeros(3, 7))}
    batch = batching.pack([], scores, A, ALONE)
    assert batch.loss_mask.sum() == 0
    assert batch.teacher_hidden.shape == (0, 7)
    assert batch.sample_ids == ()


def test_data_set_answers_have_no_rollout_logprobs():
    answer = Rollout("d", "d/0", (1,), (2, 3), None, "dataset", 0, "stop")
    assert batching.pack([answer], {}, answer, ALONE).rollout_logprobs is None


SAMPLES = [rollout("a", i, [10, 11], [20 + i, 30 + i, 40 + i][: 3 - i]) for i in range(3)]


def test_samples_that_share_their_prompt_follow_it_in_one_row():
    batch = batching.pack([*SAMPLES, B], {}, A, SHARED)
    assert batch.input_ids.tolist() == [[12, 13, 14, 15, 0], [10, 11, 20, 30, 21]][::-1]
    assert batch.attention_mask.sum(1).tolist() == [5, 4]
    assert batch.position_ids[0].tolist() == [0, 1, 2, 3, 2]
    assert batch.segment[0].tolist() == [0, 0, 1, 1, 2]
    assert batch.state_row.tolist() == [0, 0, 0, 1]
    # The first token of every sample is predicted at the last token of the prompt.
    assert batch.state_index[:3].tolist() == [[1, 2, 3], [1, 4, 0], [1, 0, 0]]
    assert batch.state_index[3, 0] == 3


def test_a_completion_attends_only_to_the_prompt_and_to_itself():
    """The row is the prompt p, the completions a (two tokens) and b (one token), and padding."""
    segment, mask = torch.tensor([[0, 0, 1, 1, 2, 0]]), torch.tensor([[1, 1, 1, 1, 1, 0]])
    added = prefix_shared_mask(segment, mask, torch.float32)
    seen = ["p     ", "pp    ", "ppa   ", "ppaa  ", "pp  b ", "pp   ."]
    assert ["".join(c if c == " " else "x" for c in row) for row in seen] == [
        "".join("x" if value == 0 else " " for value in row) for row in added[0, 0].tolist()
    ]
    assert added.min() < -1e30


@pytest.mark.parametrize(
    ("prompt", "completion", "samples", "rows"),
    [
        (100, 20, 4, 1),
        (100, 20, 1, 1),
        (5, 200, 4, 4),  # little to save, and attention over 800 tokens
    ],
)
def test_a_prompt_is_shared_if_that_is_cheaper(prompt, completion, samples, rows):
    group = [rollout("a", i, [1] * prompt, [2] * completion) for i in range(samples)]
    assert len(batching.Layout(1, sharing=1000).rows(group)) == rows
    assert len(batching.Layout(1).rows(group)) == samples


@pytest.mark.parametrize("layout", [ALONE, SHARED], ids=["alone", "shared"])
@pytest.mark.parametrize(("ranks", "tokens"), [(1, 1), (2, 1), (2, 50), (3, 50), (1, 10**6)])
def test_partition_keeps_all_rollouts_and_complete_groups(ranks, tokens, layout):
    layout = replace(layout, tokens=tokens)
    rollouts = [
        rollout(f"p{p}", i, [1] * (p + 1), [2] * (i + 1)) for p in range(7) for i in range(3)
    ]
    plan = batching.partition(rollouts, {}, ranks, layout)
    assert len(plan) == ranks
    assert len({len(part) for part in plan}) == 1, "the same number of micro-batches on every rank"
    micro_batches = [m for part in plan for m in part]
    assert sorted(r.sample_id for m in micro_batches for r in m) == sorted(
        r.sample_id for r in rollouts
    )
    for p in range(7):
        assert sum(any(r.prompt_id == f"p{p}" for r in m) for m in micro_batches) == 1
    padded = [batching.pack(m, {}, A, layout).input_ids.numel() for m in micro_batches if m]
    alone = [len({r.prompt_id for r in m}) == 1 for m in micro_batches if m]
    assert all(size <= tokens or one for size, one in zip(padded, alone, strict=True))
    if tokens == 50 and ranks == 2:
        assert len(padded) < 7, "several prompts per micro-batch if they fit"
    if tokens == 10**6:
        assert len(padded) == 1


@pytest.mark.parametrize(("groups", "ranks", "most"), [(16, 4, 4), (10, 4, 3), (3, 3, 1)])
def test_no_rank_is_empty_if_there_are_enough_groups(groups, ranks, most):
    rollouts = [rollout(f"p{p}", 0, [1] * 9, [2] * 9) for p in range(groups)]
    plan = batching.partition(rollouts, {}, ranks, batching.Layout(10**6))
    loads = [sum(map(len, part)) for part in plan]
    assert sum(loads) == groups and max(loads) == most and min(loads) >= 1


TINY = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
LOCAL = [[["global", "local"], 1]]
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("kind", "options", "shares"),
    [
        ("llama", HEADS, True),
        ("qwen2", HEADS, True),
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4}, True),
        ("mistral", {**HEADS, "sliding_window": 4}, False),
        ("gpt_neo", {"num_layers": 2, "num_heads": 4, "attention_types": LOCAL}, False),
        ("gemma2", {**HEADS, "head_dim": 8}, False),
        ("bloom", {"n_layer": 2, "n_head": 4}, False),  # positions from the mask
        ("mamba", {}, False),
    ],
)
def test_models_that_can_share_a_prompt(kind, options, shares):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **TINY, **options, bos_token_id=1, eos_token_id=2)
    sharing = prefix_sharing_factor(AutoModelForCausalLM.from_config(config).eval())
    assert (sharing > 0) == shares
    if kind == "llama":
        # per layer: q and o 32 x 32, k and v 32 x 16, three of 32 x 64, two norms (64), and half of
        # the model's final norm (16)
        assert sharing == (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 64 + 16) // 64
