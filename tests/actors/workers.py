"""Actors that fail in the ways in which actors do. Apart from the tests, so that a process has next
to nothing to import before it starts."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
from pathlib import Path

from seqkd.errors import ModelError


def take(file):
    """Whether there is a letter in ``file``, which has one less then; several processes may ask at
    once."""
    with file.open("r+") as letters:
        fcntl.flock(letters, fcntl.LOCK_EX)
        left = letters.read()
        letters.truncate(max(0, len(left) - 1))
    return bool(left)


class Worker:
    """One that fails in the ways in which actors do, as long as ``file`` says so."""

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

    def once(self, number, how):
        """``number``, but for as many calls as ``file`` has letters, each of which fails."""
        if how and take(self.file):
            getattr(self, how)()
        assert self.started
        return number


class Late(Worker):
    """Stopped while it is being made, as often as ``file`` has letters."""

    def __init__(self, file):
        if take(file):
            self.stop()
        super().__init__(file)


class Rank(Worker):
    """Of a learner."""

    def rendezvous(self):
        return "127.0.0.1", 1

    def start(self, rank, master):
        return None

    def save(self, directory):
        return getattr(self, directory)()

    def published_bytes(self, version):
        return Path(version.path).read_bytes()


class Loading(Worker):
    """An engine that is given weights, and dies at it if ``file`` says so."""

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
    """A teacher that is never asked for nothing."""

    def score(self, rollouts):
        from seqkd.types import TeacherScore

        assert rollouts
        return [TeacherScore(r.sample_id) for r in rollouts]


class Drawing(Worker):
    """One that answers with the prompt's own id, the last prompt first. Before it tells of the
    first it waits until ``file`` is there, and dies if that has a letter."""

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
