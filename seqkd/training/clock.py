"""Seconds of each stage of a step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

STAGES = ("sync", "sample", "score", "watch", "learn")


class Clock:
    """Seconds of each stage of one step."""

    def __init__(self) -> None:
        self.start, self.end = time.perf_counter(), 0.0
        self.ahead: float | None = None
        """Seconds of the step's draw, if it ran in parallel with the steps before; else None."""
        self.seconds = dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - start

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Exclude the block from the time of the step."""
        start = time.perf_counter()
        yield
        self.start += time.perf_counter() - start

    def stop(self) -> None:
        """End the step."""
        self.end = time.perf_counter()

    def total(self) -> float:
        """Return the seconds from the start of the step to its end, or to now."""
        return (self.end or time.perf_counter()) - self.start
