"""What the documentation shows is what happens."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import yaml

from seqkd.config import Config
from seqkd.objectives import OBJECTIVES
from tests.conftest import ROOT
from tests.unit.test_config import MINIMAL

OBJECTIVES_PAGE = (ROOT / "docs" / "objectives.md").read_text()


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_example_for_other_trainers_needs_nothing_but_torch():
    (code,) = blocks(OBJECTIVES_PAGE, "python")
    blocked = "pydantic", "yaml", "transformers", "ray", "vllm", "deepspeed", "accelerate", "scipy"
    prelude = f"import sys\nfor name in {blocked!r}: sys.modules[name] = None\n"
    check = "\nassert logits.grad.abs().sum() > 0 and per_token.shape == (4, 6)\n"
    done = subprocess.run(
        [sys.executable, "-c", prelude + code + check], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("text", blocks(OBJECTIVES_PAGE, "yaml"))
def test_configurations_on_the_page_are_read(text):
    data = {**MINIMAL, "data": {**MINIMAL["data"], "corpus_path": "texts.jsonl"}}
    assert len(Config.model_validate({**data, **yaml.safe_load(text)}).terms) > 1


@pytest.mark.parametrize("text", blocks((ROOT / "README.md").read_text(), "yaml"))
def test_configurations_of_the_readme_are_read(text):
    assert Config.model_validate({**MINIMAL, **yaml.safe_load(text)})


def test_every_objective_is_in_the_table():
    assert set(re.findall(r"^\| `(\w+)`", OBJECTIVES_PAGE, re.MULTILINE)) == set(OBJECTIVES)
