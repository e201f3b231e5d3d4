"""What the documentation shows is what happens."""

from __future__ import annotations

import ast
import importlib
import io
import json
import re
import subprocess
import sys

import pytest
import yaml

from seqkd.config.run import Config
from seqkd.evaluation.heldout import FIGURES
from seqkd.objectives import OBJECTIVES
from seqkd.protocols import Part
from seqkd.storage.run_directory import flat
from seqkd.training.budget import cost
from seqkd.training.clock import Clock
from seqkd.training.recorder import Recorder
from seqkd.training.step_metrics import step_metrics
from seqkd.types import Counts, PartResult, Rollout, StepResult
from tests.conftest import ROOT
from tests.unit.config.test_config import MINIMAL

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


DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors(page):
    """Of each heading, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            path, _, fragment = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.exists(), target
            assert not fragment or fragment in anchors(file), target


def first_cells(text):
    """The code in the first column of each table."""
    cells = re.findall(r"^\| ((?:[^|\n]|\\\|)*) \|", text, re.MULTILINE)
    return [code for cell in cells for code in re.findall(r"`([^`]+)`", cell)]


def test_the_reference_of_the_configuration_is_written_from_the_schema():
    from scripts import config_reference

    assert config_reference.PAGE.read_text() == config_reference.render(), (
        "run python scripts/config_reference.py"
    )


@pytest.mark.parametrize("kind", ["vllm", "hf", "openai", "multi"])
def test_every_key_of_a_resolved_configuration_is_in_the_reference_once_a_kind(kind):
    """From what a run writes, not from the schema's fields."""
    one = {"kind": "hf", "model": "b"}
    teachers = {
        "vllm": {"kind": "vllm", "model": "b"},
        "hf": one,
        "openai": {"kind": "openai", "model": "b", "base_url": "http://x"},
        "multi": {"kind": "multi", "teachers": {"NAME": {"teacher": one}}},
    }
    changes = {
        "teacher": teachers[kind],
        "sampler": "teacher",
        "warmup": {"sampler": "dataset", "steps": 1},
        "teacher_cache": {"path": "j"},
        "student": {"model": "a", "init": {"kind": "prune", "drop_layers": [0, 1]}},
    }
    known = set(first_cells((ROOT / "docs" / "configuration.md").read_text()))
    keys = flat(Config.model_validate({**MINIMAL, **changes}))
    assert len(keys) > 80
    for key in keys:
        if key.startswith("teacher.teachers.NAME.teacher."):
            key = key.replace("teachers.NAME.teacher.", "")
        key = re.sub(r"^warmup\.objective\.", "objective.", key)
        assert key in known or f"{key}[]" in known, key


def test_every_key_has_a_meaning():
    page = (ROOT / "docs" / "configuration.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) > 150
    for row in rows:
        meaning = re.split(r"(?<!\\)\|", row)[4].strip()
        assert meaning and meaning != "None", row


def usage_counters():
    text = (ROOT / "seqkd" / "teachers" / "endpoint.py").read_text()
    return set(re.findall(r'self\.used\["(\w+)"\]', text))


def recorded(directory, sampler, objective, extra_terms=(), **options):
    """The keys of a row of metrics.jsonl, all statistics of completions being known."""
    directory.mkdir()
    changes = {"sampler": sampler, "objective": objective, "extra_terms": extra_terms}
    config = Config.model_validate({**MINIMAL, **changes})
    rollout = Rollout("p", "p/0", (1,), (2, 3), (-1.0, -1.0), "student", 0, "stop")
    part = Part([rollout], {}, Counts(1, 2), config.terms[:1], **options)
    names = ("reverse_kl", "forward_kl", "entropy", "student_logprob", "teacher_logprob")
    names += ("logprob_gap", "tokens", "sequences", "weight", "weight_squared")
    names += ("ratio_tokens", "k1", "k3", "ratio_sequences", "ratio", "ratio_squared")
    seen = PartResult(dict.fromkeys(names, 1.0))
    parts = [part] * len(config.by_sampler)
    result = StepResult(1.0, 1.0, (seen,) * len(parts))
    recorder = Recorder(directory, config, io.StringIO())
    recorder.rewind(0)
    recorder.begin("main", config)
    row = step_metrics(config, "main", config, 0, 0.1, parts, result)
    clock = Clock()
    clock.ahead = 1.0
    recorder.step(0, row, cost(config, parts, 1.0), clock, 1)
    recorder.close()
    return set(json.loads((directory / "metrics.jsonl").read_text()))


def test_the_table_of_metrics_has_what_is_recorded_and_nothing_else(tmp_path):
    text = (ROOT / "docs" / "metrics.md").read_text()
    table = first_cells(text.partition("## Trackers")[0])
    assert len(table) == len(set(table))
    usage = dict.fromkeys(usage_counters(), 1)
    assert len(usage) == 4
    rate = {"kind": "sequence_reverse_kl", "normalization": "rate"}
    keys = recorded(tmp_path / "a", "mixture", rate, teacher_fraction=0.2, usage=usage)
    keys |= recorded(tmp_path / "b", "teacher", {"kind": "sequence_forward_kl"})
    held_out = {f"heldout/{figure}" for figure in FIGURES}
    assert set(table) == keys | held_out
    added = recorded(
        tmp_path / "c", "teacher", {"kind": "token_forward_kl"},
        [{"sampler": "dataset", "objective": {"kind": "sft"}}],
    )  # fmt: skip
    prefixed = {key.removeprefix("dataset/") for key in added if key.startswith("dataset/")}
    assert "length" in prefixed and prefixed <= set(table)


def messages():
    """Every text in the source, with "…" for what is put in."""

    def text(node):
        if isinstance(node, ast.JoinedStr):
            return "".join(map(text, node.values))
        return node.value if isinstance(node, ast.Constant) else "…"

    for folder in ("seqkd", "actors", "scripts"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.JoinedStr) or (
                    isinstance(node, ast.Constant) and isinstance(node.value, str)
                ):
                    yield text(node)


def quoted():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    tables = re.findall(r"\| message \|.*?\n\n", page, re.DOTALL)
    return [fragment for table in tables for fragment in first_cells(table)]


def test_every_message_that_is_quoted_can_be_met():
    fragments, said = quoted(), list(messages())
    assert len(fragments) > 60
    for fragment in fragments:
        assert any(fragment in text for text in said), fragment


def test_references_in_docstrings_exist():
    pattern = re.compile(r":(?:class|func|mod|attr|data|meth):`~?((?:seqkd|actors)\.[\w.]+)`")
    for folder in ("seqkd", "actors", "scripts"):
        for file in (ROOT / folder).rglob("*.py"):
            for name in pattern.findall(file.read_text()):
                assert resolves(name.split(".")), f"{file}: {name}"


def resolves(parts):
    """Whether a dotted name is a module, or an attribute or annotation within one."""
    for length in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            if not hasattr(value, part):
                return part in getattr(value, "__annotations__", ())
            value = getattr(value, part)
        return True
    return False
