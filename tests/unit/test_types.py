"""How records travel between processes."""

from __future__ import annotations

import pickle
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from seqkd.types import TeacherScore


def shipped(record):
    """It, pickled and read again; and the memory that went beside the pickle."""
    beside = []
    text = pickle.dumps(record, 5, buffer_callback=beside.append)
    return pickle.loads(text, buffers=beside), text, [buffer.raw() for buffer in beside]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(5, 3),
        torch.randn(5, 3).bfloat16(),
        torch.randn(3, 5).T,
        torch.arange(4, dtype=torch.int32),
        torch.tensor([True, False]),
        torch.tensor(1.5),
        torch.zeros(0, 7),
        torch.randn(3, requires_grad=True),
    ],
)
def test_every_tensor_arrives_as_it_was(tensor):
    read, _, _ = shipped(TeacherScore("a", hidden=tensor, teacher="t"))
    assert (read.sample_id, read.teacher, read.logprobs) == ("a", "t", None)
    assert read.hidden.dtype == tensor.dtype and read.hidden.shape == tensor.shape
    assert torch.equal(read.hidden, tensor.detach())


def test_no_more_than_its_own_tensors_travel_and_none_within_the_pickle():
    """Of a slice the slice alone: torch itself would pickle all of what it is a part of."""
    whole = torch.randn(1000, 64)
    score = TeacherScore("a", hidden=whole[10:20], logprobs=torch.randn(10))
    read, text, beside = shipped(score)
    assert sum(memory.nbytes for memory in beside) == 10 * 64 * 4 + 10 * 4
    assert len(text) < 1000
    for field in fields(score):
        value = getattr(read, field.name)
        if isinstance(value, Tensor):
            assert torch.equal(value, getattr(score, field.name))


def test_every_tensor_is_changed_and_nothing_else():
    score = TeacherScore("a", hidden=torch.ones(3, 4), logprobs=torch.ones(3), teacher="t")
    changed = score.map_tensors(lambda tensor: 2 * tensor[:1])
    assert torch.equal(changed.hidden, torch.full((1, 4), 2.0))
    assert torch.equal(changed.logprobs, torch.tensor([2.0]))
    assert (changed.sample_id, changed.teacher, changed.top_ids) == ("a", "t", None)


def test_it_is_read_where_it_lies():
    score = TeacherScore("a", hidden=torch.randn(10, 4))
    read, _, (memory,) = shipped(score)
    assert read.hidden.data_ptr() == torch.frombuffer(memory, dtype=torch.float32).data_ptr()
