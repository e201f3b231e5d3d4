"""The learner on a GPU of this machine: a student of Qwen2.5-1.5B's shape with random weights, a
teacher known by states as wide as the 7B's."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from actors.benchmark.rows import Row
from actors.learner import LearnerRank, RankPart
from seqkd import batching
from seqkd.config import Term
from seqkd.config_objectives import SequenceReverseKL
from seqkd.config_roles import Learner
from seqkd.models import last_hidden, layers_of
from seqkd.token_stats import OutputHead
from seqkd.types import Counts, Rollout, TeacherScore, TrainBatch

SECTION = "learner on the GPU"
VOCABULARY, TEACHER_WIDTH = 151_936, 3584
STUDENT: dict[str, Any] = {
    "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
    "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": VOCABULARY,
    "tie_word_embeddings": True, "max_position_embeddings": 4096,
}  # fmt: skip
PROMPTS, SAMPLES, PROMPT, COMPLETION = 8, 4, 256, 512
MICRO_BATCH = 8192
PRODUCT = 8192
"""Rows and columns of the matrices whose product is taken as what the GPU can do."""


def measure(repetitions: int) -> list[Row]:
    """Steps of sequence-level reverse KL with the teacher's whole distribution, in bfloat16."""
    bare = "transformers' body forward and backward, not compiled, four head products"
    step = Row(SECTION, "a step, layers compiled", "s", bare, 1.25)
    plain = Row(SECTION, "a step, layers as they are", "s", bare)
    rate = Row(SECTION, "a step's products", "TFLOP/s", "a product of large matrices")
    sharing = Row(SECTION, "a step, prompts shared", "s", "a row for each sample", 1.0)
    memory = Row(SECTION, "peak memory of a step", "GiB", "one [T, V] float32 tensor")
    rank, pays = _started()
    rollouts, scores = _texts()
    tokens = sum(len(r.completion_ids) for r in rollouts)
    terms = (Term(objective=SequenceReverseKL()),)
    counts = Counts(len(rollouts), tokens, rate=1.0, length=COMPLETION)

    def batches(sharing: int) -> list[TrainBatch]:
        layout = batching.Layout(MICRO_BATCH, sharing)
        (slots,) = batching.partition(rollouts, scores, 1, layout)
        return [batching.pack(slot, scores, rollouts[0], layout) for slot in slots]

    apart, together = (RankPart(batches(s), counts, terms, None) for s in (0, pays))
    square = torch.randn(PRODUCT, PRODUCT, device="cuda", dtype=torch.bfloat16)
    for repetition in range(repetitions + 1):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        alone = _seconds(lambda: rank.step([apart], 1e-6))
        grown = torch.cuda.max_memory_allocated() - before
        shared = _seconds(lambda: rank.step([together], 1e-6))
        with _not_compiled(rank):
            uncompiled = _seconds(lambda: rank.step([apart], 1e-6))
            floor = _seconds(lambda: _floor(rank, apart.micro_batches))
        product = _seconds(lambda: [square @ square for _ in range(20)]) / 20
        if repetition:  # the first compiles and allocates
            step.add(alone, floor)
            plain.add(uncompiled, floor)
            rate.add(_operations(rank, rollouts) / alone / 1e12, 2 * PRODUCT**3 / product / 1e12)
            sharing.add(shared, alone)
            memory.add(grown / 2**30, tokens * VOCABULARY * 4 / 2**30)
    return [step, plain, rate, sharing, memory]


def _started() -> tuple[LearnerRank, int]:
    """One rank, in this very process; and whether sharing prompts pays its student."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    os.environ["DS_ACCELERATOR"] = "cuda"  # as placement tells an actor
    torch.manual_seed(0)
    # ZeRO 0: the floor goes backward without DeepSpeed, which hooks that reduce would not bear.
    rank = LearnerRank(Learner(gpus=1, zero_stage=0, precision="bfloat16", compile=True))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        master = probe.getsockname()
    with tempfile.TemporaryDirectory() as folder:
        with torch.device("cuda"):
            shape: Any = Qwen2Config(**STUDENT)
            student = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
        student.save_pretrained(folder)
        del student
        pays = rank.start(0, master, folder, {})
    rank.teacher_heads[""] = OutputHead(_random(VOCABULARY, TEACHER_WIDTH) / TEACHER_WIDTH**0.5)
    return rank, pays


@contextmanager
def _not_compiled(rank: LearnerRank) -> Iterator[None]:
    """With the student's layers as transformers has them."""
    layers: list[Any] = layers_of(rank.engine.module.model)
    calls = [layer._compiled_call_impl for layer in layers]
    for layer in layers:
        layer._compiled_call_impl = None
    yield
    for layer, call in zip(layers, calls, strict=True):
        layer._compiled_call_impl = call


def _texts() -> tuple[list[Rollout], dict[str, TeacherScore]]:
    """Samples of random tokens, and what a teacher says of them."""
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(VOCABULARY, (count,), generator=generator).tolist())

    prompts = [tokens(PROMPT) for _ in range(PROMPTS)]
    rollouts = [
        Rollout(f"{p}", f"{p}/{i}", prompt, tokens(COMPLETION), None, "student", 0, "length")
        for p, prompt in enumerate(prompts)
        for i in range(SAMPLES)
    ]
    states = {r.sample_id: _random(COMPLETION, TEACHER_WIDTH).cpu() for r in rollouts}
    return rollouts, {name: TeacherScore(name, hidden=of) for name, of in states.items()}


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def _floor(rank: LearnerRank, batches: Sequence[TrainBatch]) -> None:
    """The student's body, forward and backward, and four products with heads."""
    model = rank.engine.module.model
    head = model.get_output_embeddings().weight.detach()
    theirs = rank.teacher_heads[""].weight
    for batch in batches:
        ids, mask = batch.input_ids.cuda(), batch.attention_mask.cuda()
        last_hidden(model, ids, mask).sum().backward()
        for low in range(0, int(batch.loss_mask.sum()), 1024):
            rows = slice(low, low + 1024)
            assert batch.teacher_hidden is not None
            states = batch.teacher_hidden[rows].cuda()
            ours = states[:, : head.shape[1]].contiguous()
            logits = ours @ head.T
            states @ theirs.T
            logits @ head
            logits.T @ ours
    model.zero_grad()


def _operations(rank: LearnerRank, rollouts: Sequence[Rollout]) -> float:
    """Multiplications and additions of a step's products, without attention's between tokens."""
    model = rank.engine.module.model
    width: int = model.config.hidden_size
    matrices: int = sum(p.numel() for p in model.base_model.parameters()) - VOCABULARY * width
    fed = sum(len(batching.fed_tokens(r)) for r in rollouts)
    learnt = sum(len(r.completion_ids) for r in rollouts)
    return 6.0 * matrices * fed + 2.0 * VOCABULARY * (3 * width + TEACHER_WIDTH) * learnt


def _seconds(work: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start
