"""Benchmarks of the stages of a step against the bare engine or model in the same process."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from scripts.benchmarks import floors
from scripts.benchmarks.rows import Row
from seqkd.checks import preflight
from seqkd.config import run as configuration
from seqkd.config.run import Config
from seqkd.learner import batching
from seqkd.models.export import materialize_student
from seqkd.models.output_head import chunk_rows
from seqkd.protocols import Part
from seqkd.training.clock import Clock
from seqkd.training.control import Control
from seqkd.training.rollouts import RolloutSource
from seqkd.types import Counts, Prompt, Rollout
from seqkd.workers import Workers


@contextmanager
def live(config: Config) -> Iterator[tuple[Workers, preflight.Checked]]:
    """Start the actors of ``config`` on a local Ray."""
    from actors import build, placement

    checked = preflight.check(config)
    with tempfile.TemporaryDirectory() as folder, build.connect(config, verbose=False):
        student = materialize_student(config.student, config.learner.precision, Path(folder) / "s")
        roles = placement.needed(config)
        with build.workers(config, student, checked, roles, Control()) as workers:
            yield workers, checked


def measure(file: str, repetitions: int) -> list[Row]:
    """Measure sampling and scoring in tokens per second, learning and weight sync in seconds."""
    sampling = Row("stages", "sampling", "tokens/s", "bare LLM.generate", 0.95, True)
    scoring = Row("stages", "scoring", "tokens/s", "bare LLM.encode", 0.9, True)
    passes = "body forward and backward, {} head products"
    learning = {
        6: Row("stages", "learning", "s", passes.format("six"), 1.25),
        4: Row("stages", "learning", "s", passes.format("four")),
    }
    sync = Row("stages", "weight sync", "s", "bare reload of the same weights", 2.0)
    config = configuration.load(file)
    with live(config) as (workers, checked), tempfile.TemporaryDirectory(dir="/dev/shm") as shared:
        student: Any = workers.student
        (engine,) = student.pool.actors
        teacher: Any = next(iter(workers.teachers.values()))
        (scorer,) = teacher.pool.actors
        learner: Any = workers.learner
        (rank,) = learner.ranks
        prompts = list(checked.train[: config.prompts_per_step])
        source = RolloutSource(config, config, "student", workers)
        for repetition in range(repetitions + 1):
            clock = Clock()
            workers.sync()
            sampled = scored = bare_sampled = 0
            generating = encoding = 0.0
            # This order cancels a slow drift of the machine's speed.
            for seed, actor_turn in enumerate((True, False, False, True), 4 * repetition):
                if actor_turn:
                    drawn = source.draw([prompts], seed, clock)
                    (rollouts,) = drawn.steps
                    sampled += sum(len(r.completion_ids) for r in rollouts)
                    scored += sum(len(batching.fed_tokens(r)) for r in rollouts)
                else:
                    tokens, seconds = _inside(engine, generate, prompts, config, seed)
                    bare_sampled, generating = bare_sampled + tokens, generating + seconds
                    encoding += _inside(scorer, encode, rollouts)
            counts = Counts(len(rollouts), sum(len(r.completion_ids) for r in rollouts))
            with clock("learn"):
                learner.step(
                    [Part(rollouts, drawn.scores, counts, config.terms)], config.learner.lr
                )
            with clock("sync"):
                workers.sync()
            # Like the sync, the reload of the same weights follows work of the learner.
            floor = {products: _inside(rank, learn, rollouts, products) for products in learning}
            _inside(rank, save, f"{shared}/model.safetensors")
            reloading = _inside(engine, reload, shared)
            if repetition:  # the first is a warm-up
                sampling.add(sampled / clock.seconds["sample"], bare_sampled / generating)
                scoring.add(scored / clock.seconds["score"], scored / encoding)
                for products, row in learning.items():
                    row.add(clock.seconds["learn"], floor[products])
                sync.add(clock.seconds["sync"], reloading)
    return [sampling, scoring, *learning.values(), sync]


def _inside(actor: Any, function: Any, *arguments: Any) -> Any:
    """Call ``function`` on the actor object in its process."""
    return ray.get(actor.__ray_call__.remote(function, *arguments))


def generate(actor: Any, prompts: Sequence[Prompt], config: Config, seed: int) -> tuple[int, float]:
    """Return tokens and seconds of the bare engine, without log-probs or communication between
    processes."""
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
    inputs = [{"prompt_token_ids": list(prompt.token_ids)} for prompt in prompts]
    outputs = actor.llm.generate(inputs, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    return sum(len(c.token_ids) for output in outputs for c in output.outputs), seconds


def encode(actor: Any, rollouts: Sequence[Rollout]) -> float:
    """Return the seconds of the teacher's bare engine."""
    inputs = [{"prompt_token_ids": batching.fed_tokens(r)} for r in rollouts]
    start = time.perf_counter()
    actor.states.llm.encode(inputs, pooling_task="token_embed", use_tqdm=False)
    return time.perf_counter() - start


def learn(rank: Any, rollouts: Sequence[Rollout], products: int) -> float:
    """Return the seconds of the student's bare passes and of ``products`` products with its
    head."""
    model = rank.engine.module.model
    batches = floors.micro_batches(rollouts, rank.config.micro_batch_tokens)
    head = model.get_output_embeddings().weight.detach()
    tokens = sum(len(r.completion_ids) for r in rollouts)
    start = time.perf_counter()
    floors.learn(model, batches, [head] * (products - 2), tokens, chunk_rows(head))
    return time.perf_counter() - start


def save(rank: Any, path: str) -> None:
    """Save the student's weights to a file for vLLM's reload."""
    from safetensors.torch import save_file

    state = {n: p.detach().clone() for n, p in rank.engine.module.model.named_parameters()}
    save_file(state, path)


def reload(actor: Any, directory: str) -> float:
    """Return the seconds of vLLM's own reload."""
    start = time.perf_counter()
    actor.llm.collective_rpc("reload_weights", kwargs={"weights_path": directory})
    return time.perf_counter() - start
