"""Benchmarks on a GPU of this machine, without Ray and vLLM and with random weights.

Measured are the losses, the learner of a student with the shape of Qwen2.5-1.5B, scoring by a
teacher as wide as Qwen2.5-7B, and the learner's side of weight sync.
"""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from actors import weight_sync
from actors.host_memory import to_host, wait_for_copies
from actors.learner import LearnerRank
from actors.teacher import HfStates
from scripts.benchmarks import floors, objectives
from scripts.benchmarks.rows import Row
from seqkd.config.learner import LearnerConfig
from seqkd.config.objectives import SequenceReverseKLConfig
from seqkd.config.phases import TermConfig
from seqkd.config.teacher import HfTeacherConfig
from seqkd.errors import ConfigError
from seqkd.learner import batching
from seqkd.learner.loss import RankPart
from seqkd.models.output_head import OutputHead
from seqkd.models.pruning import layers_of
from seqkd.studies.step_cost import QWEN_1_5B, QWEN_7B, Shape
from seqkd.types import Counts, Rollout, TeacherScore

STUDENT = QWEN_1_5B
TEACHER = replace(QWEN_7B, layers=8, vocabulary=STUDENT.vocabulary)
PROMPTS, SAMPLES, PROMPT, COMPLETION = 8, 4, 256, 512
MICRO_BATCH = 8192
PRODUCT = 8192
"""Rows and columns of the matrices whose product is the GPU's reference speed."""


def measure(file: str, repetitions: int) -> Iterator[Row]:
    """Measure everything on the GPU. Raises ConfigError if there is no GPU."""
    if not torch.cuda.is_available():
        raise ConfigError("section 'gpu': torch found no GPU on this machine. Omit the section.")
    yield from objectives.measure(file, repetitions, "cuda")
    yield from learner(repetitions)
    yield from teacher(repetitions)
    yield publishing(repetitions)


def learner(repetitions: int) -> list[Row]:
    """Measure steps of sequence-level reverse KL with the full teacher distribution, bfloat16."""
    section, bare = "learner on the GPU", "bare body passes, not compiled, four head products"
    compiled = Row(section, "a step, layers compiled", "s", bare, 1.25)
    plain = Row(section, "a step, layers not compiled", "s", bare)
    rate = Row(section, "a step's products", "TFLOP/s", "a product of large matrices")
    sharing = Row(section, "a step, prompts shared", "s", "one row per sample", 1.0)
    memory = Row(section, "peak memory of a step", "GiB", "one [T, V] float32 tensor")
    rank, shared_tokens = _start_rank()
    model = rank.engine.module.model
    heads = [model.get_output_embeddings().weight.detach(), rank.teacher_heads[""].weight]
    rollouts = _rollouts()
    scores = {
        r.sample_id: TeacherScore(r.sample_id, hidden=_random(COMPLETION, TEACHER.width).cpu())
        for r in rollouts
    }
    tokens = PROMPTS * SAMPLES * COMPLETION
    counts = Counts(len(rollouts), tokens, rate=1.0, length=COMPLETION)

    def part(sharing: int) -> RankPart:
        layout = batching.Layout(MICRO_BATCH, sharing)
        (slots,) = batching.partition(rollouts, scores, 1, layout)
        batches = [batching.pack(slot, scores, rollouts[0], layout) for slot in slots]
        return RankPart(batches, counts, (TermConfig(objective=SequenceReverseKLConfig()),), None)

    separate, shared, batches = part(0), part(shared_tokens), floors.micro_batches(
        rollouts, MICRO_BATCH)  # fmt: skip
    # Floating-point operations of a step, without attention between tokens.
    body = sum(p.numel() for p in model.base_model.parameters()) - heads[0].numel()
    read = sum(len(batching.fed_tokens(r)) for r in rollouts)
    operations = 6 * body * read + 2 * (3 * heads[0].numel() + heads[1].numel()) * tokens
    for repetition in range(repetitions + 1):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step = _seconds(lambda: rank.step([separate], 1e-6))
        peak = torch.cuda.max_memory_allocated() - before
        shared_step = _seconds(lambda: rank.step([shared], 1e-6))
        with _not_compiled(model):
            plain_step = _seconds(lambda: rank.step([separate], 1e-6))
            floor = _seconds(lambda: floors.learn(model, batches, heads, tokens, 1024))
        reference = _product_rate()
        if repetition:  # the first compiles and allocates
            compiled.add(step, floor)
            plain.add(plain_step, floor)
            rate.add(operations / step / 1e12, reference)
            sharing.add(shared_step, step)
            memory.add(peak / 2**30, tokens * STUDENT.vocabulary * 4 / 2**30)
    return [compiled, plain, rate, sharing, memory]


def teacher(repetitions: int) -> list[Row]:
    """Measure a teacher of kind hf: from token ids to states in host memory."""
    section = "teacher on the GPU"
    speed = Row(section, "scoring, kind hf", "tokens/s", "bare body forward", 0.9, True)
    rate = Row(section, "its products", "TFLOP/s", "a product of large matrices")
    with tempfile.TemporaryDirectory() as folder:
        _random_model(TEACHER).save_pretrained(folder)
        config = HfTeacherConfig(
            model=folder, precision="bfloat16", gpus=1, batch_tokens=MICRO_BATCH
        )
        states = HfStates(config, PROMPT + COMPLETION)
    sequences = [batching.fed_tokens(r) for r in _rollouts()]
    tokens, together = sum(map(len, sequences)), MICRO_BATCH // len(sequences[0])
    body: Any = states.model.base_model
    operations = 2 * sum(p.numel() for p in body.layers.parameters()) * tokens

    @torch.inference_mode()
    def bare() -> None:
        for low in range(0, len(sequences), together):
            ids = torch.tensor(sequences[low : low + together], device="cuda")
            body(input_ids=ids, use_cache=False)

    for repetition in range(repetitions + 1):
        scoring, floor = _seconds(lambda: states.compute(sequences)), _seconds(bare)
        reference = _product_rate()
        if repetition:
            speed.add(tokens / scoring, tokens / floor)
            rate.add(operations / scoring / 1e12, reference)
    return [speed, rate]


def publishing(repetitions: int) -> Row:
    """Measure publishing a student's weights from the GPU to the file for engines, with
    digests."""
    row = Row("weights on the GPU", "publishing 1.5 B weights", "GB/s", "a copy to host memory",
              higher_is_better=True)  # fmt: skip
    state = {name: p.detach() for name, p in _random_model(STUDENT).named_parameters()}
    size = sum(p.nbytes for p in state.values()) / 1e9
    with weight_sync.memory_file() as file:

        def publish() -> None:
            gathered = {name: to_host(p) for name, p in state.items()}
            wait_for_copies("cuda")
            weight_sync.publish(gathered, 0, file, "here")

        for repetition in range(repetitions + 1):
            seconds, floor = _seconds(publish), _seconds(lambda: [p.cpu() for p in state.values()])
            if repetition:
                row.add(size / seconds, size / floor)
    return row


def _random_model(shape: Shape) -> Any:
    tied = shape == STUDENT
    with torch.device("cuda"):
        config: Any = Qwen2Config(
            hidden_size=shape.width, intermediate_size=shape.inner, num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads, num_key_value_heads=shape.key_values,
            vocab_size=shape.vocabulary, tie_word_embeddings=tied, max_position_embeddings=4096,
        )  # fmt: skip
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def _start_rank() -> tuple[LearnerRank, int]:
    """Return one rank, in this process, and its :attr:`~seqkd.learner.batching.Layout.sharing`."""
    os.environ["DS_ACCELERATOR"] = "cuda"  # set by the placement in a real run
    torch.manual_seed(0)
    # ZeRO 0: the floor runs backward without DeepSpeed, whose reducing hooks would fail.
    rank = LearnerRank(LearnerConfig(gpus=1, zero_stage=0, precision="bfloat16", compile=True))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        master = probe.getsockname()
    with tempfile.TemporaryDirectory() as folder:
        _random_model(STUDENT).save_pretrained(folder)
        sharing = rank.start(0, master, folder, {})
    rank.teacher_heads[""] = OutputHead(
        _random(STUDENT.vocabulary, TEACHER.width) / TEACHER.width**0.5
    )
    return rank, sharing


@contextmanager
def _not_compiled(model: Any) -> Iterator[None]:
    """Use the student's layers without compilation."""
    layers: list[Any] = layers_of(model)
    calls = [layer._compiled_call_impl for layer in layers]
    for layer in layers:
        layer._compiled_call_impl = None
    yield
    for layer, call in zip(layers, calls, strict=True):
        layer._compiled_call_impl = call


def _rollouts() -> list[Rollout]:
    """Return samples of random tokens, ``SAMPLES`` for each of ``PROMPTS`` prompts."""
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(STUDENT.vocabulary, (count,), generator=generator).tolist())

    prompts = [tokens(PROMPT) for _ in range(PROMPTS)]
    return [
        Rollout(f"{p}", f"{p}/{i}", prompt, tokens(COMPLETION), None, "student", 0, "length")
        for p, prompt in enumerate(prompts)
        for i in range(SAMPLES)
    ]


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def _product_rate() -> float:
    """Return the TFLOP/s of a product of large matrices."""
    square = _random(PRODUCT, PRODUCT)
    return 20 * 2e-12 * PRODUCT**3 / _seconds(lambda: [square @ square for _ in range(20)])


def _seconds(work: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start
