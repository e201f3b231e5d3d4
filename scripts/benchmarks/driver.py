"""Benchmark of the driver: memory over many steps, and transfer of teacher states to a rank."""

from __future__ import annotations

import time
from typing import Any

import ray
import torch

from actors.groups import TeacherGroup
from actors.pool import Pool, remote
from scripts.benchmarks import runs
from scripts.benchmarks.rows import Row
from seqkd.learner.batching import Layout, pack, partition
from seqkd.types import Rollout, TeacherScore

SEQUENCES, PROMPT, TOKENS, WIDTH = 128, 32, 256, 2048
"""Shape of the states: 256 MiB in float32."""
LAYOUT = Layout(8192)


def measure(file: str, repetitions: int) -> list[Row]:
    """Measure memory on configs/tiny.yaml, and the transfer between stand-ins of the actors."""
    return [runs.driver_memory(1000), transfer(repetitions)]


class Scorer:
    """Stand-in for a teacher that returns scores without computing them."""

    def score(self, rollouts: list[Rollout]) -> list[TeacherScore]:
        """Return states of the right size."""
        return [
            TeacherScore(r.sample_id, hidden=torch.ones(len(r.completion_ids), WIDTH))
            for r in rollouts
        ]


class Rank:
    """Stand-in for a learner rank."""

    def take(self, batches: list[Any]) -> None:
        """Receive the batches of a step."""


def transfer(repetitions: int) -> Row:
    """Measure bytes per second through TeacherGroup, packing, and a call of a rank."""
    row = Row("driver", "teacher's states to the learner", "GB/s", "one copy in memory",
              higher_is_better=True)  # fmt: skip
    tokens, logprobs = tuple(range(TOKENS)), (0.0,) * TOKENS
    rollouts = [
        Rollout(str(i), str(i), tuple(range(PROMPT)), tokens, logprobs, "student", 0, "stop")
        for i in range(SEQUENCES)
    ]
    size = SEQUENCES * TOKENS * WIDTH * 4 / 1e9
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        scorer = TeacherGroup(Pool("teacher", [remote(Scorer).remote()]))
        rank = Pool("learner", [remote(Rank).remote()])
        for repetition in range(repetitions + 1):
            start = time.perf_counter()
            scores = scorer.score(rollouts)
            (slots,) = partition(rollouts, scores, 1, LAYOUT)
            batches = [pack(slot, scores, rollouts[0], LAYOUT) for slot in slots]
            rank.call("take", [(batches,)])
            moved = time.perf_counter() - start
            states = torch.ones(SEQUENCES * TOKENS, WIDTH)
            start = time.perf_counter()
            states.clone()
            if repetition:  # the first allocates
                row.add(size / moved, size / (time.perf_counter() - start))
    finally:
        ray.shutdown()
    return row
