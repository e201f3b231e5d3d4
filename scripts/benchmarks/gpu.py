"""On a GPU of this machine, without Ray and vLLM, random weights: the learner of a student of
Qwen2.5-1.5B's shape and a teacher known by states as wide as the 7B's; such a teacher as it scores;
the learner's side of weight sync."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from actors import weight_sync
from actors.host_memory import to_host, wait_for_copies
from actors.learner import LearnerRank
from scripts.benchmarks.rows import Row
from seqkd.config.learner import LearnerConfig
from seqkd.config.objectives import SequenceReverseKLConfig
from seqkd.config.phases import TermConfig
from seqkd.config.teacher import HfTeacherConfig
from seqkd.learner import batching
from seqkd.learner.loss import RankPart
from seqkd.learner.student import last_hidden
from seqkd.models.output_head import OutputHead
from seqkd.models.pruning import layers_of
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
TEACHER: dict[str, Any] = {
    "hidden_size": TEACHER_WIDTH, "intermediate_size": 18_944, "num_hidden_layers": 8,
    "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
}  # fmt: skip
"""Qwen2.5-7B's, with 8 of its 28 layers."""
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
    terms = (TermConfig(objective=SequenceReverseKLConfig()),)
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


def teacher(repetitions: int) -> list[Row]:
    """A teacher of kind hf: from token ids to states in this process's memory."""
    from transformers import Qwen2Config

    from actors.teacher import HfStates

    speed = Row(
        "teacher on the GPU", "scoring, kind hf", "tokens/s", "bare body forward", 0.9, True
    )
    rate = Row("teacher on the GPU", "its products", "TFLOP/s", "a product of large matrices")
    with tempfile.TemporaryDirectory() as folder:
        _write_random(Qwen2Config(**TEACHER), folder)
        config = HfTeacherConfig(
            model=folder, precision="bfloat16", gpus=1, batch_tokens=MICRO_BATCH
        )
        states = HfStates(config, PROMPT + COMPLETION)
    rollouts, _ = _texts()
    sequences = [batching.fed_tokens(r) for r in rollouts]
    tokens = sum(map(len, sequences))
    together = MICRO_BATCH // len(sequences[0])
    body: Any = states.model.base_model
    layers = sum(p.numel() for p in body.layers.parameters())

    @torch.inference_mode()
    def bare() -> None:
        for low in range(0, len(sequences), together):
            ids = torch.tensor(sequences[low : low + together], device="cuda")
            body(input_ids=ids, use_cache=False)

    square = torch.randn(PRODUCT, PRODUCT, device="cuda", dtype=torch.bfloat16)
    for repetition in range(repetitions + 1):
        ours, floor = _seconds(lambda: states.of(sequences)), _seconds(bare)
        product = _seconds(lambda: [square @ square for _ in range(20)]) / 20
        if repetition:
            speed.add(tokens / ours, tokens / floor)
            rate.add(2e-12 * layers * tokens / ours, 2e-12 * PRODUCT**3 / product)
    return [speed, rate]


def publishing(repetitions: int) -> list[Row]:
    """A student's weights from the GPU into the file that engines read, with their digests."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    row = Row("weights on the GPU", "publishing 1.5 B weights", "GB/s", "a copy to this memory",
              more_is_better=True)  # fmt: skip
    with torch.device("cuda"):
        shape: Any = Qwen2Config(**STUDENT)
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    state = {name: p.detach() for name, p in model.named_parameters()}
    size = sum(p.nbytes for p in state.values()) / 1e9
    with weight_sync.memory_file() as file:

        def publish() -> None:
            gathered = {name: to_host(p) for name, p in state.items()}
            wait_for_copies("cuda")
            weight_sync.publish(gathered, 0, file, "here")

        for repetition in range(repetitions + 1):
            ours, floor = _seconds(publish), _seconds(lambda: [p.cpu() for p in state.values()])
            if repetition:
                row.add(size / ours, size / floor)
    return [row]


def _write_random(shape: Any, folder: str) -> None:
    from transformers import AutoModelForCausalLM

    with torch.device("cuda"):
        model: Any = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    model.save_pretrained(folder)


def _started() -> tuple[LearnerRank, int]:
    """One rank, in this very process; and whether sharing prompts pays its student."""
    from transformers import Qwen2Config

    os.environ["DS_ACCELERATOR"] = "cuda"  # as placement tells an actor
    torch.manual_seed(0)
    # ZeRO 0: the floor goes backward without DeepSpeed, which hooks that reduce would not bear.
    rank = LearnerRank(LearnerConfig(gpus=1, zero_stage=0, precision="bfloat16", compile=True))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        master = probe.getsockname()
    with tempfile.TemporaryDirectory() as folder:
        _write_random(Qwen2Config(**STUDENT), folder)
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
