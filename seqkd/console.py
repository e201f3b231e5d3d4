"""Output on the terminal, exit codes and signals of the commands.

Rich is imported on first use, so that ``seqkd --help`` stays fast. All text is printed literally:
rich's markup is off, and control characters of prompts, completions and names are removed.
"""

from __future__ import annotations

import logging
import os
import signal as signals
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from functools import lru_cache
from signal import SIGINT, Signals
from statistics import fmean
from typing import TYPE_CHECKING, TextIO

from seqkd.errors import SeqkdError, Stopped
from seqkd.escaping import clean

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live
    from rich.progress import Progress as Bar
    from rich.table import Table
    from rich.text import Text

UNLIMITED = 100_000
"""Columns of a file or pipe, where lines are never wrapped."""
STYLES = {"error": "bold red", "stopped": "bold yellow", "warning": "yellow"}


def run_command(action: Callable[[], int], hint: str = "") -> int:
    """Run ``action`` and return its exit code.

    A SeqkdError is printed on stderr, and the exit code is 2. After a signal, ``hint`` is printed,
    which names the command that continues, and the exit code is 128 + the signal's number."""

    def stop(number: int, frame: object) -> None:
        raise Stopped(Signals(number))

    before = signals.signal(signals.SIGTERM, stop)
    try:
        return action()
    except Stopped as stopped:
        print_message("stopped", "; ".join(filter(None, (str(stopped), hint))))
        return 128 + stopped.signal
    except KeyboardInterrupt:
        print_message("stopped", "; ".join(filter(None, ("interrupted", hint))))
        return 128 + SIGINT
    except SeqkdError as error:
        if details := getattr(error, "details", ""):
            show(details.rstrip("\n"), file=sys.stderr)
        print_message("error", str(error))
        return 2
    finally:
        signals.signal(signals.SIGTERM, before)


def print_message(level: str, text: str, indent: str = "", file: TextIO | None = None) -> None:
    """Print each line of ``text`` as ``level: line``. Lines that begin with a space continue the
    message before them. The default of ``file`` is stderr."""
    from rich.text import Text

    for line in clean(text).splitlines():
        prefix = ("", "") if line.startswith(" ") else (f"{level}: ", STYLES[level])
        show(Text.assemble(indent, prefix, line), file=file or sys.stderr)


def red_warning(text: str) -> Text:
    """Return a warning about the result, for :func:`show`."""
    from rich.text import Text

    return Text(f"warning: {clean(text)}", STYLES["error"])


def show(*parts: RenderableType, file: TextIO | None = None) -> None:
    """Print texts without wrapping, and tables that fit the terminal, and flush ``file``."""
    from rich.text import Text

    out = console(file or sys.stdout)
    for part in parts:
        text = Text(clean(part)) if isinstance(part, str) else part
        if not isinstance(text, Text) and not out.is_terminal:
            with out.capture() as capture:
                out.print(text)
            text = Text("\n".join(line.rstrip() for line in capture.get().splitlines()))
        out.print(text, soft_wrap=isinstance(text, Text))


def table(rows: Iterable[Sequence[str]], heads: Sequence[str] = ()) -> Table:
    """Return rows of texts as aligned columns, for :func:`show`."""
    from rich.table import Table
    from rich.text import Text

    def cells(texts: Sequence[str]) -> list[Text]:
        return [Text(clean(text), overflow="fold") for text in texts]

    grid = Table(box=None, pad_edge=False, show_header=bool(heads), header_style="bold")
    for head in cells(heads):
        grid.add_column(head)
    for row in rows:
        grid.add_row(*cells(row))
    return grid


def console(file: TextIO) -> Console:
    """Return the console of a file. While a live display runs, it prints above the display."""
    return _console(getattr(file, "rich_proxied_file", file))


@lru_cache(maxsize=8)
def _console(file: TextIO) -> Console:
    from rich.console import Console

    # Not left to rich: FORCE_COLOR would put escape sequences into logs.
    terminal = file.isatty()
    return Console(
        file=file, force_terminal=terminal, width=None if terminal else UNLIMITED,
        markup=False, emoji=False, highlight=False, force_jupyter=False,
    )  # fmt: skip


class Progress:
    """Progress of a loop. In a terminal, a bar and the figures of the last step are shown.
    Elsewhere, each step is one line. The caller closes the object."""

    def __init__(self, file: TextIO | None = None) -> None:
        self.file = file or sys.stdout
        self.console = console(self.file)
        self.display: Live | None = None
        self.bar: Bar | None = None
        self.clock: Bar | None = None
        self.recent: deque[float] = deque(maxlen=10)
        """Seconds of the last steps."""

    def begin(self, text: str) -> None:
        """Print a line, and begin with a new bar."""
        self.close()
        self.note(text)

    def note(self, text: str) -> None:
        """Print a line."""
        if self.display is not None and self.bar is None:
            self.close()
        show(text, file=self.file)

    def wait(self, text: str) -> None:
        """Print a line, and in a terminal the time elapsed since then, until the next call."""
        self.note(text)
        if self.console.is_interactive and self.bar is None:
            from rich.progress import Progress as Bar
            from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

            text_column = TextColumn("{task.description}", markup=False)
            self.clock = Bar(SpinnerColumn(), TimeElapsedColumn(), text_column)
            self.clock.add_task("", total=None)
            self.display = self._start(self.clock, transient=True)

    def status(self, text: str) -> None:
        """Show the state of the operation that :meth:`wait` announced: in a terminal next to the
        time, elsewhere as a line."""
        if self.clock is None:
            self.note(text)
        else:
            self.clock.update(self.clock.task_ids[0], description=clean(text))

    def step(self, title: str, done: int, total: int, figures: str, seconds: float) -> None:
        """Show the figures of step ``done`` of ``total``, which took ``seconds``."""
        self.recent.append(seconds)
        left = str(timedelta(seconds=int((total - done) * fmean(self.recent))))
        if self.console.is_interactive:
            self._draw(title, done, total, figures, left)
        else:
            self.note(f"{title:<6} {done:>3}/{total}  {figures}  ETA {left}")
        if done >= total:
            self.close()

    def close(self) -> None:
        """Stop the display. The last state of a bar remains visible."""
        if self.display is not None:
            self.display.stop()
        self.display = self.bar = self.clock = None
        self.recent.clear()

    def _draw(self, title: str, done: int, total: int, figures: str, left: str) -> None:
        from rich.console import Group
        from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn
        from rich.progress import Progress as Bar
        from rich.table import Column
        from rich.text import Text

        if self.bar is None or self.display is None:
            if self.display is not None:  # the clock of a wait
                self.display.stop()
                self.clock = None
            self.bar = Bar(
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                MofNCompleteColumn(),
                BarColumn(None, table_column=Column(max_width=40)),
                TextColumn("ETA {task.fields[left]}", markup=False),
            )
            self.bar.add_task(clean(title), left=left)
            self.display = self._start(self.bar)
        self.bar.update(self.bar.task_ids[0], completed=done, total=total, left=left)
        # The options of a note that is printed above would switch wrapping off.
        below = Text(clean(figures), no_wrap=False, overflow="fold")
        self.display.update(Group(self.bar, below))

    def _start(self, content: Bar, transient: bool = False) -> Live:
        from rich.live import Live

        # Rich would send a redirected stderr to the terminal.
        both = sys.stderr.isatty()
        display = Live(content, console=self.console, transient=transient, redirect_stderr=both)
        display.start()
        return display


def quiet() -> None:
    """Hide the progress bars and notices of the libraries in this process."""
    from transformers.utils import logging as transformers_logging

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # of this process; each actor gets its own
    warnings.filterwarnings("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
