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
        """What the step's draw took beside the steps before it; None where it was waited for from
        its beginning."""
        self.seconds = dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - start

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """What is done meanwhile is no part of the step."""
        start = time.perf_counter()
        yield
        self.start += time.perf_counter() - start

    def stop(self) -> None:
        """The step ends here."""
        self.end = time.perf_counter()

    def total(self) -> float:
        """Seconds since the step began, to where it was stopped."""
        return (self.end or time.perf_counter()) - self.start
