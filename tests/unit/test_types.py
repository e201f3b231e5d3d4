"""Serialization of records between processes."""

from __future__ import annotations

import pickle
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from seqkd.types import TeacherScore


def round_trip(record):
    """Return the record after pickling and unpickling, the pickle, and its out-of-band buffers."""
    buffers = []
    text = pickle.dumps(record, 5, buffer_callback=buffers.append)
    return pickle.loads(text, buffers=buffers), text, [buffer.raw() for buffer in buffers]


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
def test_tensors_survive_a_round_trip(tensor):
    read, _, _ = round_trip(TeacherScore("a", hidden=tensor, teacher="t"))
    assert (read.sample_id, read.teacher, read.logprobs) == ("a", "t", None)
    assert read.hidden.dtype == tensor.dtype and read.hidden.shape == tensor.shape
    assert torch.equal(read.hidden, tensor.detach())


def test_only_the_records_own_data_is_sent_and_not_in_the_pickle():
    """A slice is sent alone, although torch itself would pickle the complete storage."""
    whole = torch.randn(1000, 64)
    score = TeacherScore("a", hidden=whole[10:20], logprobs=torch.randn(10))
    read, text, buffers = round_trip(score)
    assert sum(memory.nbytes for memory in buffers) == 10 * 64 * 4 + 10 * 4
    assert len(text) < 1000
    for field in fields(score):
        value = getattr(read, field.name)
        if isinstance(value, Tensor):
            assert torch.equal(value, getattr(score, field.name))


def test_map_tensors_changes_only_tensors():
    score = TeacherScore("a", hidden=torch.ones(3, 4), logprobs=torch.ones(3), teacher="t")
    changed = score.map_tensors(lambda tensor: 2 * tensor[:1])
    assert torch.equal(changed.hidden, torch.full((1, 4), 2.0))
    assert torch.equal(changed.logprobs, torch.tensor([2.0]))
    assert (changed.sample_id, changed.teacher, changed.top_ids) == ("a", "t", None)


def test_a_record_is_read_without_a_copy():
    score = TeacherScore("a", hidden=torch.randn(10, 4))
    read, _, (memory,) = round_trip(score)
    assert read.hidden.data_ptr() == torch.frombuffer(memory, dtype=torch.float32).data_ptr()
