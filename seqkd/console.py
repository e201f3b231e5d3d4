"""Exit codes, signals and messages on the terminal."""

from __future__ import annotations

import signal as signals
import sys
from collections.abc import Callable
from signal import SIGINT, Signals
from typing import TextIO

from seqkd.errors import SeqkdError, Stopped


def run_command(action: Callable[[], int], again: str = "") -> int:
    """The exit code of ``action``; 2, with the message on stderr, where a user has to act; that of
    a shell where a signal ended it, with ``again`` to say how to go on."""

    def stop(number: int, frame: object) -> None:
        raise Stopped(Signals(number))

    before = signals.signal(signals.SIGTERM, stop)
    try:
        return action()
    except Stopped as stopped:
        print_message("stopped", "; ".join(filter(None, (str(stopped), again))), file=sys.stderr)
        return 128 + stopped.signal
    except KeyboardInterrupt:
        print_message("stopped", "; ".join(filter(None, ("interrupted", again))), file=sys.stderr)
        return 128 + SIGINT
    except SeqkdError as error:
        print(getattr(error, "details", ""), end="", file=sys.stderr)
        print_message("error", str(error), file=sys.stderr)
        return 2
    finally:
        signals.signal(signals.SIGTERM, before)


def print_message(level: str, text: str, indent: str = "", file: TextIO | None = None) -> None:
    """A line a finding; what belongs to the one before is indented."""
    for line in text.splitlines():
        print(
            indent + (line if line.startswith(" ") else f"{level}: {line}"), file=file, flush=True
        )
