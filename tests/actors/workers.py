"""Actors with injected failures. They are in a separate module so that their processes start with
few imports."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
from pathlib import Path

from seqkd.errors import ModelError


def take(file):
    """Remove a letter from ``file``, and return True if there was one. Several processes may call
    this at the same time."""
    with file.open("r+") as letters:
        fcntl.flock(letters, fcntl.LOCK_EX)
        left = letters.read()
        letters.truncate(max(0, len(left) - 1))
    return bool(left)


class Worker:
    """Actor that fails as often as ``file`` has letters."""

    def __init__(self, file=None):
        self.file, self.started = file, False

    def start(self):
        self.started = True

    def pid(self):
        return os.getpid()

    def refuse(self):
        raise ModelError("student.model: is none.")

    def fail(self):
        raise ConnectionError("connection closed by peer")

    def die(self):
        os._exit(1)

    def stop(self):
        os.kill(os.getpid(), signal.SIGSTOP)

    def hang(self):
        threading.Event().wait()

    def slow(self, seconds):
        threading.Event().wait(seconds)
        return seconds

    def once(self, number, how):
        """Return ``number``. As many calls as ``file`` has letters fail instead."""
        if how and take(self.file):
            getattr(self, how)()
        assert self.started
        return number


class Late(Worker):
    """Actor that is stopped in its constructor, as often as ``file`` has letters."""

    def __init__(self, file):
        if take(file):
            self.stop()
        super().__init__(file)


class Rank(Worker):
    """Rank of a learner."""

    def rendezvous(self):
        return "127.0.0.1", 1

    def start(self, rank, master):
        return None

    def save(self, directory):
        return getattr(self, directory)()

    def published_bytes(self, version):
        return Path(version.path).read_bytes()


class Loading(Worker):
    """Engine that loads weights, and dies while loading if ``file`` has a letter."""

    version = None

    def node(self):
        return "here"

    def load(self, version, data):
        self.once(0, "die")
        assert version.path == "/published", "the file of an older version is gone"
        self.version = version.policy_version

    def loaded(self, number):
        self.once(number, "die")
        return self.version


class Scorer:
    """Teacher that fails if it is called without rollouts."""

    def score(self, rollouts):
        from seqkd.types import TeacherScore

        assert rollouts
        return [TeacherScore(r.sample_id) for r in rollouts]


class Drawing(Worker):
    """Engine that answers with the prompt's id, the last prompt first. Before the answer to the
    first prompt it waits until ``file`` exists, and dies if it has a letter."""

    def sample(self, prompts, seeds, samples, max_tokens, temperature, top_p):
        from seqkd.types import Rollout

        for place in reversed(range(len(prompts))):
            if place == 0 and self.file:
                while not self.file.exists():
                    threading.Event().wait(0.01)
                if take(self.file):
                    self.die()
            prompt, seed = prompts[place], seeds[place]
            for i in range(samples[place]):
                yield place, i, Rollout(
                    prompt.prompt_id, f"{prompt.prompt_id}/{seed}/{i}", prompt.token_ids, (1,),
                    (0.0,), f"by {os.getpid()}", 0, "length",
                )  # fmt: skip
