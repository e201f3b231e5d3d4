"""The command ``seqkd``: help, errors, completion, and the scripts that wrap it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from seqkd.cli.main import COMMANDS, main
from tests.conftest import ROOT

HEAVY = (
    "rich",
    "torch",
    "transformers",
    "pydantic",
    "numpy",
    "ray",
    "vllm",
    "deepspeed",
    "datasets",
)
SCRIPTS = {name: f"{module.__name__.rpartition('.')[2]}.py" for name, module in COMMANDS.items()}


def run(*command):
    """Run a Python process in another directory, and return its exit code and output."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])}
    return subprocess.run(
        [sys.executable, *command], cwd="/", env=environment, capture_output=True, text=True
    )


def test_help_imports_no_large_library():
    """One process prints the help of all commands and imports the Python API."""
    code = f"""
import sys, json, seqkd
from seqkd.cli.main import main
for arguments in (["--help"], *([name, "--help"] for name in {[*COMMANDS]})):
    try:
        main(arguments)
    except SystemExit as stopped:
        assert stopped.code == 0
print(json.dumps([name for name in {HEAVY} if name in sys.modules]))
"""
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    *text, heavy = done.stdout.splitlines()
    assert json.loads(heavy) == []
    for name in COMMANDS:
        assert any(line.startswith(f"usage: seqkd {name} [-h]") for line in text), name
        assert any(re.match(rf"    {name} +[A-Z].*", line) for line in text), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the following arguments are required: COMMAND"),
        (("trian",), "invalid choice: 'trian' (choose from 'train', 'evaluate', "),
        (("--verbose", "train", "x.yaml"), "unrecognized arguments: --verbose"),
        (("train", "x.yaml", "--steps", "3"), "Set a configuration key without dashes: key=value."),
        (("report", "x", "--watch", "abc"), "'abc' is not a number of seconds of at least 1."),
        (("train",), "\nerror: the following arguments are required: config\n"),
        (
            ("compare", "x.yaml", "--jobs", "0"),
            "error: argument --jobs: '0' is not an integer of at least 1.",
        ),
        (
            ("inspect", "x.yaml", "-n", "0"),
            "error: argument -n: '0' is not an integer of at least 1.",
        ),
    ],
)
def test_wrong_command_lines_are_rejected(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["train", "precompute", "inspect"])
def test_options_may_be_between_overrides(capsys, tmp_path, name):
    """Only the missing configuration is reported, so the arguments were parsed."""
    option = ["-n", "1"] if name == "inspect" else ["--verbose"]
    arguments = [name, str(tmp_path / "none.yaml"), "steps=1", *option, "learner.lr=1"]
    assert main(arguments) == 2
    assert f"error: {tmp_path}/none.yaml: no such file" in capsys.readouterr().err


def test_shells_complete_commands_options_and_files(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--print-completion", "bash"])
    assert stopped.value.code == 0
    (tmp_path / "mine.yaml").touch()
    script = tmp_path / "completion.bash"
    script.write_text(capsys.readouterr().out + COMPLETE)

    def complete(*words):
        done = subprocess.run(
            ["bash", str(script), *words], cwd=tmp_path, capture_output=True, text=True
        )
        return done.stdout.split()

    assert complete("seqkd", "pre") == ["precompute"]
    assert complete("seqkd", "train", "mine.yaml", "--re") == ["--resume"]
    assert complete("seqkd", "train", "mi") == ["mine.yaml"]
    assert complete("seqkd", "evaluate", "mine.yaml", "--config", "mi") == ["mine.yaml"]


COMPLETE = """
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMP_LINE="$*" COMP_POINT=${#COMP_LINE}
$(complete -p seqkd | sed 's/.*-F \\([^ ]*\\).*/\\1/')
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize("name", COMMANDS)
def test_a_script_behaves_like_its_command(name):
    """Compare the exit codes and all lines, in a directory that is not on Python's path."""
    script = run(str(ROOT / "scripts" / SCRIPTS[name]), "--unknown")
    command = run("-m", "seqkd", name, "--unknown")
    assert script.returncode == command.returncode == 2
    assert script.stderr == command.stderr
    assert script.stderr.startswith(f"usage: seqkd {name} ") and "\nerror: " in script.stderr
