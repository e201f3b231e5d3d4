"""Control of a run: signals that stop it, and a budget of restarts."""

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
"""Interval at which waiting code checks if the run should stop."""


class Control:
    """Stop signals and restart budget, checked by all code that waits."""

    def __init__(
        self, recovery: RecoveryConfig | None = None, say: Callable[[str], None] = lambda text: None
    ) -> None:
        self.recovery, self.say = recovery or RecoveryConfig(), say
        self.restarts = 0
        """Restarts since the last checkpoint."""
        self.first: SeqkdError | None = None
        """Cause of the first of these restarts."""
        self.tick: Callable[[], None] = lambda: None
        """Function that is called by all code that waits, every TICK_S. It raises if the cluster is
        lost."""
        self.signal: signal.Signals | None = None
        self._asked = 0.0

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Handle SIGTERM (`ray job stop`, a scheduler) and SIGINT (Ctrl-C) for the duration of the
        block. The first signal stops the run at the next consistent state, a second one
        immediately."""

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
        """Raise Stopped if a signal was received. A draw in parallel with the learner, in its own
        thread, has the same grace period as the learner's step: if it were abandoned, a different
        student would repeat it."""
        if threading.current_thread() is not threading.main_thread():
            self.check_after_grace()
            return
        self.tick()
        if self.signal is not None:
            raise Stopped(self.signal)

    def check_after_grace(self) -> None:
        """Raise Stopped if a signal was received more than ``recovery.grace_s`` seconds ago."""
        self.tick()
        over = time.monotonic() - self._asked > self.recovery.grace_s
        if self.signal is not None and over:
            raise Stopped(self.signal)

    def restart(self, what: str, cause: SeqkdError) -> None:
        """Count a restart of ``what`` and pause before it. Raises ActorError with the first cause
        if no restart is left."""
        self.first = self.first or cause
        if self.restarts >= self.recovery.restarts:
            raise ActorError(
                f"{self.first} This was the first of {self.restarts + 1} losses since the last "
                f"checkpoint, and recovery.restarts is {self.recovery.restarts}. Fix the cause, or "
                "raise recovery.restarts if machines are preemptible. Then continue (seqkd train: "
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
        """Reset the restart budget after a checkpoint."""
        self.restarts, self.first = 0, None
