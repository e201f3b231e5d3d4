"""One picklable hierarchy of errors a user can act on.

Every message names the field or file, the value found there and the mend. Entry points turn a
:class:`SeqkdError` into that one message and exit code 2; anything else is a defect and keeps its
traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TextIO


class SeqkdError(Exception):
    """Base of every error that is the user's to mend. Its string is the whole message."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return self.message


class ConfigError(SeqkdError):
    """A configuration that cannot run: unknown key, wrong type, impossible combination."""


class DataError(SeqkdError):
    """A data set that cannot be read as prompts."""


class JournalError(SeqkdError):
    """A journal that lacks what a run needs of it, or cannot be read."""


class ModelError(SeqkdError):
    """A model or tokenizer that cannot be loaded or does not fit the other one."""


class ResourceError(SeqkdError):
    """Fewer cores, GPUs or memory than the plan needs, or no cluster to run on."""


class ActorError(SeqkdError):
    """An actor failed; the message carries the first cause, not the last symptom.

    ``details`` is the actor's own traceback, shown above the message; empty where it has none."""

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details

    def __reduce__(self) -> tuple[type[ActorError], tuple[str, str]]:
        return ActorError, (self.message, self.details)


class SyncError(SeqkdError):
    """The weights an engine received are not the weights that the learner sent."""


def reported(action: Callable[[], int]) -> int:
    """The exit code of ``action``; 2, with the message on stderr, where a user has to act."""
    try:
        return action()
    except SeqkdError as error:
        print(getattr(error, "details", ""), end="", file=sys.stderr)
        say("error", str(error), file=sys.stderr)
        return 2


def say(level: str, text: str, indent: str = "", file: TextIO | None = None) -> None:
    """A line a finding; what belongs to the one before is indented."""
    for line in text.splitlines():
        print(
            indent + (line if line.startswith(" ") else f"{level}: {line}"), file=file, flush=True
        )
