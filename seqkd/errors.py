"""Picklable errors that a user can act on.

Every message contains the field or file, its value and the fix. Commands print the message of a
:class:`SeqkdError` and exit with code 2. Any other exception is a bug and is shown with its
traceback.
"""

from __future__ import annotations

from signal import Signals


class SeqkdError(Exception):
    """Base class of errors that the user can fix. ``str(error)`` is the complete message."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return self.message


class ConfigError(SeqkdError):
    """Invalid configuration: an unknown key, a wrong type or an impossible combination."""


class DataError(SeqkdError):
    """Data that cannot be read as prompts."""


class TeacherCacheError(SeqkdError):
    """A teacher cache or a replay log that cannot be read or lacks records that the run needs."""


class CheckpointError(SeqkdError):
    """An incomplete or damaged checkpoint."""


class ModelError(SeqkdError):
    """A model or tokenizer that cannot be loaded, or a student and a teacher that do not match."""


class ResourceError(SeqkdError):
    """Fewer cores or GPUs or less memory than the run needs, or no cluster to run on."""


class ClusterLost(ResourceError):
    """A cluster that no longer answers."""


class ActorError(SeqkdError):
    """A failed actor. The message reports the first cause, not the last symptom.

    ``details`` is the actor's own traceback, which is printed above the message. It may be empty.
    """

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details

    def __reduce__(self) -> tuple[type[ActorError], tuple[str, str]]:
        return ActorError, (self.message, self.details)


class SyncError(SeqkdError):
    """Engine weights that differ from the weights that the learner sent."""


class LearningFault(SeqkdError):
    """Wrong training data or wrong weights, with which further training would be useless. The
    results of the steps before the fault are valid."""


class LearnerLost(SeqkdError):
    """The loss of a learner rank, and with it of all training since the last checkpoint."""

    def __init__(self, cause: SeqkdError, gone: bool) -> None:
        super().__init__(str(cause))
        self.cause = cause
        self.gone = gone
        """True if the process is dead or does not respond. False if it raised an error."""

    def __reduce__(self) -> tuple[type[LearnerLost], tuple[SeqkdError, bool]]:
        return LearnerLost, (self.cause, self.gone)

    def raise_if_repeated(self, before: str) -> str:
        """Raise the cause if it equals ``before``, the error of the processes that were replaced,
        since a third attempt would not help.

        Returns the error message to compare with the next error, empty if the process is gone.
        """
        if not self.gone and str(self) == before:
            raise self.cause from None
        return "" if self.gone else str(self)


class Stopped(SeqkdError):
    """A signal that stops the run."""

    def __init__(self, signal: Signals) -> None:
        super().__init__(f"by {signal.name}")
        self.signal = signal

    def __reduce__(self) -> tuple[type[Stopped], tuple[Signals]]:
        return Stopped, (self.signal,)


class StorageError(SeqkdError):
    """A file of the run that cannot be written, for lack of disk space or permission."""
