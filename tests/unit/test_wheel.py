"""The wheel contains everything that an installation without the checkout needs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from configparser import ConfigParser
from zipfile import ZipFile

import pytest

import seqkd
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel from a copy, because the build writes into its directory."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    for name in ("seqkd", "actors", "scripts", "tests", "pyproject.toml", "README.md", "LICENSE"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)
    code = f"from setuptools.build_meta import build_wheel; build_wheel({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = out.iterdir()
    with ZipFile(file) as opened:
        yield opened


def test_wheel_has_every_file_of_the_packages(wheel):
    expected = {
        str(file.relative_to(ROOT))
        for package in ("seqkd", "actors")
        for file in (ROOT / package).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == expected
    assert {"seqkd/py.typed", "seqkd/cli/main.py"} < names
    assert any(name.startswith("seqkd/report/templates/") for name in names)


def test_wheel_has_one_command_and_the_version_of_the_package(wheel):
    files = {name.rpartition("/")[2]: wheel.read(name).decode() for name in wheel.namelist()
             if ".dist-info/" in name and not name.endswith("/")}  # fmt: skip
    scripts = ConfigParser()
    scripts.read_string(files["entry_points.txt"])
    assert dict(scripts["console_scripts"]) == {"seqkd": "seqkd.cli.main:main"}
    assert f"\nVersion: {seqkd.__version__}\n" in files["METADATA"]
    assert "Requires-Dist: shtab" in files["METADATA"]
