"""How fast teacher scores go from a scorer through the driver to a learner's rank."""

from __future__ import annotations

import time
from typing import Any

import torch

from actors.groups import TeacherGroup
from actors.pool import Pool, remote
from scripts.benchmarks.rows import Row
from seqkd.learner.batching import Layout, pack, partition
from seqkd.types import Rollout, TeacherScore

SEQUENCES, PROMPT, TOKENS, WIDTH = 128, 32, 256, 2048
"""256 MiB of float32 states."""


class Scorer:
    """At a teacher's place: scores that cost nothing to compute."""

    def score(self, rollouts: list[Rollout]) -> list[TeacherScore]:
        """States of the right size."""
        return [
            TeacherScore(r.sample_id, hidden=torch.ones(len(r.completion_ids), WIDTH))
            for r in rollouts
        ]


class Rank:
    """At a learner's place."""

    def take(self, batches: list[Any]) -> None:
        """What a step is given."""


def measure(repetitions: int) -> Row:
    """Bytes a second through TeacherGroup, packing, and the call on a rank."""
    import ray

    row = Row("driver", "teacher's states to the learner", "GB/s", "one copy in memory",
              more_is_better=True)  # fmt: skip
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
            begun = time.perf_counter()
            scores = scorer.score(rollouts)
            (dealt,) = partition(rollouts, scores, 1, Layout(8192))
            batches = [pack(of, scores, rollouts[0], Layout(8192)) for of in dealt]
            rank.call("take", [(batches,)])
            moved = time.perf_counter() - begun
            states = torch.ones(SEQUENCES * TOKENS, WIDTH)
            begun = time.perf_counter()
            states.clone()
            if repetition:
                row.add(size / moved, size / (time.perf_counter() - begun))
    finally:
        ray.shutdown()
    return row
