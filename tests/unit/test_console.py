"""Output on terminals, and in logs."""

from __future__ import annotations

import io
import re
import sys

import pytest

from seqkd.console import Progress, print_message, show, table
from seqkd.escaping import clean

HOSTILE = "[bold]a[/bold] :smile: \x1b[31mred\x1b]0;title\x07 \r\x00\u202eb"
HARMLESS = "[bold]a[/bold] :smile: [31mred]0;title b"
FIGURES = "loss 1.5  length 12"


class Terminal(io.StringIO):
    """A file that claims to be a terminal."""

    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def run(file):
    """Print the lines of a short run."""
    progress = Progress(file)
    progress.wait("starting")
    progress.begin(f"main {HOSTILE}")
    progress.step("main", 1, 2, FIGURES, 60.0)
    progress.note("a note")
    progress.step("main", 2, 2, FIGURES, 30.0)
    progress.close()
    return file.getvalue()


LINES = [
    "starting",
    f"main {HARMLESS}",
    f"main     1/2  {FIGURES}  ETA 0:01:00",
    "a note",
    f"main     2/2  {FIGURES}  ETA 0:00:00",
]


def test_a_log_has_one_plain_line_per_step(monkeypatch):
    assert run(io.StringIO()).splitlines() == LINES
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert run(io.StringIO()).splitlines() == LINES


def test_a_dumb_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    assert run(Terminal()).splitlines() == LINES


@pytest.mark.parametrize("columns", ["100", "30"])
def test_a_terminal_gets_a_bar_that_is_closed(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    text = run(Terminal())
    assert f"main {HARMLESS}" in text and "a note\n" in text
    assert "2/2" in text and "━" in text and "ETA" in text and "loss 1.5" in text
    assert text.count("\033[?25l") == text.count("\033[?25h") > 0, "the cursor is visible again"


def test_the_status_of_a_wait_is_beside_the_clock_in_a_terminal_and_a_line_elsewhere():
    for file in (io.StringIO(), Terminal()):
        progress = Progress(file)
        progress.status("before")
        progress.wait("starting")
        progress.status("rollout loading")
        progress.status(f"rollout ready {HOSTILE}")
        progress.step("main", 1, 2, FIGURES, 60.0)
        progress.status("after")
        progress.begin("evaluation")
        progress.wait("measuring")
        progress.close()
        progress.status("closed")
        text = file.getvalue()
        if file.isatty():
            plain = re.sub(r"\033\[[0-9;?]*[A-Za-z]", "", text)
            assert f"0:00:00 rollout ready {HARMLESS}" in plain
            assert all(f"{line}\n" in plain for line in ("before", "after", "closed"))
        else:
            lines = ["before", "starting", "rollout loading", f"rollout ready {HARMLESS}"]
            assert text.splitlines() == [
                *lines, LINES[2], "after", "evaluation", "measuring", "closed"
            ]  # fmt: skip


def test_colors_can_be_switched_off(monkeypatch):
    assert "\033[38;5" in run(Terminal()) or "\033[3" in run(Terminal())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not any(f"\033[{color}" in run(Terminal()) for color in ("3", "9", "1;3"))


def test_texts_are_printed_literally():
    for file in (io.StringIO(), Terminal()):
        show(HOSTILE, table([[HOSTILE]], [HOSTILE]), file=file)
        assert file.getvalue().count(HARMLESS) >= 2 and "\033[31m" not in file.getvalue()
    assert clean("a\tb\n") == "a\tb\n"


def test_tables_are_folded_in_narrow_terminals_only(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    rows = [["name", "x" * 100], ["longer name", "1"]]
    files = io.StringIO(), Terminal()
    for file in files:
        show(table(rows), file=file)
    log, terminal = (file.getvalue().splitlines() for file in files)
    assert log == [f"name         {'x' * 100}", "longer name  1"]
    assert max(map(len, terminal)) <= 40
    assert "".join(terminal).count("x") == 100, "no text is lost"


def test_every_line_of_an_error_has_its_prefix(capsys):
    print_message("error", "a: is 1.\n  more\nb: is 2.")
    print_message("warning", f"c {HOSTILE}", indent="  ")
    print_message("error", "d", file=sys.stdout)
    out, err = capsys.readouterr()
    assert err == f"error: a: is 1.\n  more\nerror: b: is 2.\n  warning: c {HARMLESS}\n"
    assert out == "error: d\n"
