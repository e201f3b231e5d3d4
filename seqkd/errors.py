"""One picklable hierarchy of errors a user can act on.

Every message names the field or file, the value found there and the mend. Entry points turn a
:class:`SeqkdError` into that one message and exit code 2; anything else is a defect and keeps its
traceback.
"""

from __future__ import annotations

from signal import Signals


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


class TeacherCacheError(SeqkdError):
    """A teacher cache or a replay log that lacks what a run needs of it, or cannot be read."""


class CheckpointError(SeqkdError):
    """A checkpoint that is not whole."""


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


class LearningFault(SeqkdError):
    """What a run learns from, or has learnt, is not what it should be: going on would teach
    garbage. What was learnt before the step of the fault is as it was."""


class LearnerLost(SeqkdError):
    """A rank of the learner is lost, and with it what was learnt since the last checkpoint."""

    def __init__(self, cause: SeqkdError, gone: bool) -> None:
        super().__init__(str(cause))
        self.cause = cause
        self.gone = gone
        """Whether its process is dead or does not answer; else it raised."""

    def __reduce__(self) -> tuple[type[LearnerLost], tuple[SeqkdError, bool]]:
        return LearnerLost, (self.cause, self.gone)

    def raise_if_repeated(self, before: str) -> str:
        """What it raised, to be compared with the next one; raises the cause where new processes
        have raised the same as those ``before`` them: a third try would not help."""
        if not self.gone and str(self) == before:
            raise self.cause from None
        return "" if self.gone else str(self)


class Stopped(SeqkdError):
    """The run was told to stop by a signal."""

    def __init__(self, signal: Signals) -> None:
        super().__init__(f"by {signal.name}")
        self.signal = signal

    def __reduce__(self) -> tuple[type[Stopped], tuple[Signals]]:
        return Stopped, (self.signal,)


class StorageError(SeqkdError):
    """A file of the run that cannot be written: no room, no permission."""
