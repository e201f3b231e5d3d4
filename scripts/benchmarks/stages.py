"""Each stage of a step against its floor: the bare engine or model, in the very same process."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from actors.pool import Calls, Failure
from scripts.benchmarks.rows import Row
from seqkd.checks import preflight
from seqkd.config.run import Config
from seqkd.learner import batching
from seqkd.learner.student import last_hidden
from seqkd.models.export import materialize_student
from seqkd.models.output_head import OutputHead, chunk_rows
from seqkd.training.clock import Clock
from seqkd.training.control import Control
from seqkd.training.rollouts import RolloutSource
from seqkd.types import Prompt, Rollout
from seqkd.workers import Workers


@contextmanager
def live(config: Config) -> Iterator[tuple[Workers, preflight.Checked]]:
    """Every actor of ``config``, on a Ray of this machine."""
    from actors import build, placement

    checked = preflight.check(config)
    with tempfile.TemporaryDirectory() as folder, build.connect(config, verbose=False):
        student = materialize_student(config.student, config.learner.precision, Path(folder) / "s")
        roles = placement.needed(config)
        with build.workers(config, student, checked, roles, Control()) as workers:
            yield workers, checked


def measure(config: Config, repetitions: int) -> list[Row]:
    """Sampling and scoring by tokens a second, learning and weight sync by seconds."""
    rows: dict[str | int, Row] = {
        "sample": Row("stages", "sampling", "tokens/s", "bare LLM.generate", 0.95, True),
        "score": Row("stages", "scoring", "tokens/s", "bare LLM.encode", 0.9, True),
        6: Row("stages", "learning", "s", "body forward and backward, six head products", 1.25),
        4: Row("stages", "learning", "s", "body forward and backward, four head products"),
        "sync": Row("stages", "weight sync", "s", "bare reload of the same weights", 2.0),
    }
    with live(config) as (workers, checked):
        student: Any = workers.student
        (engine,) = student.pool.actors
        teacher: Any = next(iter(workers.teachers.values()))
        (scorer,) = teacher.pool.actors
        learner: Any = workers.learner
        (rank,) = learner.ranks
        prompts = list(checked.train[: config.prompts_per_step])
        source = RolloutSource(config, config, "student", workers)
        with tempfile.TemporaryDirectory(dir="/dev/shm") as shared:
            for repetition in range(repetitions + 1):
                clock = Clock()
                workers.sync()
                tokens = read = generated = 0
                generating = encoding = 0.0
                # In this order what grows slower meanwhile does so for both.
                for seed, turn in enumerate(("ours", "bare", "bare", "ours"), 4 * repetition):
                    if turn == "ours":
                        source.drawn = source.draw([prompts], seed, clock)
                        (drawn,) = source.drawn.steps
                        tokens += sum(len(r.completion_ids) for r in drawn)
                        read += sum(len(batching.fed_tokens(r)) for r in drawn)
                    else:
                        made, seconds = _asked(engine, generate, prompts, config, seed)
                        generated, generating = generated + made, generating + seconds
                        encoding += _asked(scorer, encode, drawn)
                part = source.part(clock)
                with clock("learn"):
                    learner.step([part], config.learner.lr)
                with clock("sync"):
                    workers.sync()
                # A reload of the same weights, after the learner has been at work as well.
                learning = {count: _asked(rank, floor, drawn, count) for count in (6, 4)}
                _asked(rank, save, f"{shared}/model.safetensors")
                reloading = _asked(engine, reload, shared)
                took = clock.seconds
                if repetition:  # the first is warm-up: kernels, allocators
                    rows["sample"].add(tokens / took["sample"], generated / generating)
                    rows["score"].add(read / took["score"], read / encoding)
                    for count, bare in learning.items():
                        rows[count].add(took["learn"], bare)
                    rows["sync"].add(took["sync"], reloading)
    return list(rows.values())


def _asked(actor: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    """What ``function`` makes of the actor itself, in its process."""
    calls = Calls("benchmark", Control())
    calls.add(0, actor, actor.__ray_call__.remote(function, *arguments))
    answer = calls.next()
    assert answer is not None
    if isinstance(answer[1], Failure):
        raise answer[1].cause
    return answer[1]


def generate(actor: Any, prompts: Sequence[Prompt], config: Config, seed: int) -> tuple[int, float]:
    """Tokens and seconds of the engine alone: no log-probs, nothing across processes."""
    from vllm import SamplingParams

    rollout = config.rollout
    params = [
        SamplingParams(
            n=rollout.samples_per_prompt,
            seed=seed * len(prompts) + index,
            max_tokens=rollout.max_tokens,
            temperature=rollout.temperature,
            stop_token_ids=actor.stop_ids,
            detokenize=False,
        )
        for index in range(len(prompts))
    ]
    actor.llm.reset_prefix_cache()
    start = time.perf_counter()
    asked = [{"prompt_token_ids": list(prompt.token_ids)} for prompt in prompts]
    outputs = actor.llm.generate(asked, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    return sum(len(c.token_ids) for output in outputs for c in output.outputs), seconds


def encode(actor: Any, rollouts: Sequence[Rollout]) -> float:
    """Seconds of the teacher's engine alone."""
    asked = [{"prompt_token_ids": batching.fed_tokens(r)} for r in rollouts]
    start = time.perf_counter()
    actor.states.llm.encode(asked, pooling_task="token_embed", use_tqdm=False)
    return time.perf_counter() - start


def floor(rank: Any, rollouts: Sequence[Rollout], products: int) -> float:
    """Seconds of the student's body, forward and backward, over micro-batches as the learner has
    them without shared prompts, and of ``products`` with its head over the completion tokens."""
    model = rank.engine.module.model
    layout = batching.Layout(rank.config.micro_batch_tokens)
    (slots,) = batching.partition(rollouts, {}, 1, layout)
    padded = [batching.padded([batching.fed_tokens(r) for r in slot]) for slot in slots]
    weight = model.get_output_embeddings().weight.detach()
    count = sum(len(r.completion_ids) for r in rollouts)
    states = torch.randn(count, weight.shape[1], dtype=weight.dtype)
    chunks, room = states.split(chunk_rows(weight)), OutputHead(weight).room(count)
    start = time.perf_counter()
    for ids, mask in padded:
        last_hidden(model, ids, mask).sum().backward()
    into = torch.zeros_like(weight)
    for part in chunks:
        logits = room[: len(part)]
        for _ in range(products - 2):
            torch.mm(part, weight.T, out=logits)
        logits @ weight
        into.addmm_(logits.T, part)
    seconds = time.perf_counter() - start
    model.zero_grad()
    return seconds


def save(rank: Any, path: str) -> None:
    """The student's weights, as a file that vLLM reloads."""
    from safetensors.torch import save_file

    state = {n: p.detach().clone() for n, p in rank.engine.module.model.named_parameters()}
    save_file(state, path)


def reload(actor: Any, directory: str) -> float:
    """Seconds of vLLM's own reload."""
    start = time.perf_counter()
    actor.llm.collective_rpc("reload_weights", kwargs={"weights_path": directory})
    return time.perf_counter() - start
