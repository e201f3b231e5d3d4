"""Exit codes, signals and messages on the terminal."""

from __future__ import annotations

import logging
import os
import signal as signals
import sys
import warnings
from collections.abc import Callable
from signal import SIGINT, Signals
from typing import TextIO

from seqkd.errors import SeqkdError, Stopped


def run_command(action: Callable[[], int], hint: str = "") -> int:
    """Run ``action`` and return its exit code.

    An error that the user can fix is printed on stderr and gives 2. A signal gives the exit code
    that a shell gives, and ``hint`` is printed, which says how to continue."""

    def stop(number: int, frame: object) -> None:
        raise Stopped(Signals(number))

    before = signals.signal(signals.SIGTERM, stop)
    try:
        return action()
    except Stopped as stopped:
        print_message("stopped", "; ".join(filter(None, (str(stopped), hint))), file=sys.stderr)
        return 128 + stopped.signal
    except KeyboardInterrupt:
        print_message("stopped", "; ".join(filter(None, ("interrupted", hint))), file=sys.stderr)
        return 128 + SIGINT
    except SeqkdError as error:
        print(getattr(error, "details", ""), end="", file=sys.stderr)
        print_message("error", str(error), file=sys.stderr)
        return 2
    finally:
        signals.signal(signals.SIGTERM, before)


def print_message(level: str, text: str, indent: str = "", file: TextIO | None = None) -> None:
    """Print each line of ``text`` as one message. A line that begins with a space continues the
    message before it."""
    for line in text.splitlines():
        print(
            indent + (line if line.startswith(" ") else f"{level}: {line}"), file=file, flush=True
        )


def quiet() -> None:
    """Hide the progress bars and notices of the libraries in this process."""
    from transformers.utils import logging as transformers_logging

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # of this process; each actor gets its own
    warnings.filterwarnings("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
