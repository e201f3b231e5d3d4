"""What stops a run or starts parts of it again: signals, and a budget of restarts."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from seqkd.config.lifecycle import RecoveryConfig
from seqkd.errors import ActorError, SeqkdError, Stopped

LONGEST_PAUSE_S = 60.0
TICK_S = 0.2
"""How often a wait looks whether the run should stop."""


class Control:
    """Asked by everything that waits."""

    def __init__(
        self, recovery: RecoveryConfig | None = None, say: Callable[[str], None] = lambda text: None
    ) -> None:
        self.recovery, self.say = recovery or RecoveryConfig(), say
        self.restarts = 0
        """Since the last checkpoint."""
        self.first: SeqkdError | None = None
        """What was lost first since then."""
        self.signal: signal.Signals | None = None
        self._asked = 0.0

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Note SIGTERM (`ray job stop`, a scheduler) and SIGINT (Ctrl-C) while the block runs, so
        that the run stops where its state is whole. A second one ends it where it is."""

        def note(number: int, frame: FrameType | None) -> None:
            if self.signal is not None:
                raise KeyboardInterrupt
            self.signal, self._asked = signal.Signals(number), time.monotonic()

        before = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def check(self) -> None:
        """Stopped if the run was told to stop. A draw beside the learner, which is in a thread of
        its own, has the grace that the learner's step has: given up, it would be drawn anew by
        another student."""
        if threading.current_thread() is not threading.main_thread():
            self.check_after_grace()
        elif self.signal is not None:
            raise Stopped(self.signal)

    def check_after_grace(self) -> None:
        """The same, for what is worth finishing within ``recovery.grace_s``."""
        over = time.monotonic() - self._asked > self.recovery.grace_s
        if self.signal is not None and over:
            raise Stopped(self.signal)

    def restart(self, what: str, cause: SeqkdError) -> None:
        """Count a restart of ``what`` and pause before it; ActorError with the first cause where
        none is left."""
        self.first = self.first or cause
        if self.restarts >= self.recovery.restarts:
            raise ActorError(
                f"{self.first} It was the first of {self.restarts + 1} losses since the last "
                f"checkpoint, and recovery.restarts is {self.recovery.restarts}. Fix the cause "
                "(raise recovery.restarts if machines come and go), then continue (seqkd train: "
                "with --resume).",
                getattr(self.first, "details", ""),
            )
        pause = min(LONGEST_PAUSE_S, self.recovery.backoff_s * 2.0 ** min(self.restarts, 20))
        self.restarts += 1
        self.say(
            f"{cause} Restarting {what} in {pause:g} s "
            f"({self.restarts} of {self.recovery.restarts} since the last checkpoint)."
        )
        until = time.monotonic() + pause
        while time.monotonic() < until:
            self.check()
            time.sleep(min(TICK_S, pause))

    def saved(self) -> None:
        """A checkpoint was written: the budget is whole again."""
        self.restarts, self.first = 0, None
