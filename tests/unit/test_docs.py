"""The documentation agrees with the code: commands, configurations, metrics, messages, links."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import io
import json
import re
import shlex
import subprocess
import sys

import pytest
import yaml

import seqkd.errors
from scripts.docs_hooks import on_page_content, on_page_markdown
from seqkd.cli.main import COMMANDS
from seqkd.config.run import Config, load
from seqkd.config.samplers import SAMPLERS
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

README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]
OBJECTIVES_PAGE = (DOCS / "objectives.md").read_text()


def blocks(text, language):
    """Return the code blocks of a page in one language."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_example_for_other_trainers_needs_only_torch():
    (code,) = blocks(OBJECTIVES_PAGE, "python")
    blocked = "pydantic", "yaml", "transformers", "ray", "vllm", "deepspeed", "accelerate", "scipy"
    prelude = f"import sys\nfor name in {blocked!r}: sys.modules[name] = None\n"
    check = "\nassert logits.grad.abs().sum() > 0 and per_token.shape == (4, 6)\n"
    done = subprocess.run(
        [sys.executable, "-c", prelude + code + check], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("text", blocks(OBJECTIVES_PAGE, "yaml"))
def test_configurations_of_the_objectives_page_are_valid(text):
    data = {**MINIMAL, "data": {**MINIMAL["data"], "corpus_path": "texts.jsonl"}}
    assert len(Config.model_validate({**data, **yaml.safe_load(text)}).terms) > 1


@pytest.mark.parametrize("text", blocks(README.read_text(), "yaml"))
def test_configurations_of_the_readme_are_valid(text):
    assert Config.model_validate({**MINIMAL, **yaml.safe_load(text)})


def test_objectives_page_lists_every_objective():
    assert set(re.findall(r"^\| `(\w+)`", OBJECTIVES_PAGE, re.MULTILINE)) == set(OBJECTIVES)


def anchors(page):
    """Return the anchors of all headings, as on GitHub and on the site."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_have_targets(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            path, _, fragment = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.exists(), target
            assert not fragment or fragment in anchors(file), target


def first_cells(text):
    """Return the code in the first column of all tables."""
    cells = re.findall(r"^\| ((?:[^|\n]|\\\|)*) \|", text, re.MULTILINE)
    return [code for cell in cells for code in re.findall(r"`([^`]+)`", cell)]


def test_keys_are_described_once():
    """Keys of several kinds of a section, such as teachers, are described once per kind."""
    page = (DOCS / "configuration.md").read_text()
    for section in re.split(r"^#+ ", page, flags=re.MULTILINE):
        keys = first_cells(section)
        assert len(keys) == len(set(keys)), section.partition("\n")[0]


def test_configuration_page_is_generated_from_the_schema():
    from scripts import config_reference

    assert config_reference.PAGE.read_text() == config_reference.render(), (
        "run python scripts/config_reference.py"
    )


@pytest.mark.parametrize("kind", ["vllm", "hf", "openai", "multi"])
def test_configuration_page_has_every_key_of_a_resolved_configuration(kind):
    """The keys are those that a run writes to config.yaml, not the fields of the schema."""
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
    documented = set(first_cells((DOCS / "configuration.md").read_text()))
    keys = flat(Config.model_validate({**MINIMAL, **changes}))
    assert len(keys) > 80
    for key in keys:
        if key.startswith("teacher.teachers.NAME.teacher."):
            key = key.replace("teachers.NAME.teacher.", "")
        key = re.sub(r"^warmup\.objective\.", "objective.", key)
        assert {key, f"{key}[]", f"{key}.NAME"} & documented, key


SECTIONS = "student|teacher|data|rollout|learner|evaluation|checkpoints|recovery|alarms|objective"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_on_other_pages_exist(page):
    keys = {key.rstrip("[]") for key in first_cells((DOCS / "configuration.md").read_text())}
    text = page.read_text().partition("## Changed")[0]  # renamed keys in the changelog
    for key in re.findall(rf"`((?:{SECTIONS})\.[a-z_.]+)(?:[:=][^`]*)?`", text):
        exists = key in keys or any(k.startswith(f"{key}.") for k in keys)
        assert exists or key.endswith((".json", ".md", ".py", ".jsonl", ".html")), key


def test_every_key_has_a_description():
    page = (DOCS / "configuration.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) > 150
    for row in rows:
        meaning = re.split(r"(?<!\\)\|", row)[4].strip()
        assert meaning and meaning != "None", row


def usage_counters():
    """Return the names of the counters of an endpoint."""
    text = (ROOT / "seqkd" / "teachers" / "endpoint.py").read_text()
    return set(re.findall(r'self\.used\["(\w+)"\]', text))


def recorded(directory, sampler, objective, extra_terms=(), **options):
    """Return the keys of a line of metrics.jsonl for a step with all statistics."""
    directory.mkdir()
    changes = {"sampler": sampler, "objective": objective, "extra_terms": extra_terms}
    if "usage" in options:
        changes["teacher"] = {
            "kind": "openai", "model": "b", "base_url": "http://127.0.0.1/v1",
            "api": "completions", "scores": "top_k", "tokenizer": "b",
        }  # fmt: skip
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


def test_metrics_page_lists_exactly_the_recorded_metrics(tmp_path):
    text = (DOCS / "metrics.md").read_text()
    table = first_cells(text.partition("## Trackers")[0])
    assert len(table) == len(set(table))
    usage = dict.fromkeys(usage_counters(), 1)
    assert len(usage) == 6
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
    """Return all string constants of the source, with "…" for inserted values."""

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


def quoted_messages():
    """Return the messages in the tables of the troubleshooting page."""
    page = (DOCS / "troubleshooting.md").read_text()
    tables = re.findall(r"\| message \|.*?\n\n", page, re.DOTALL)
    return [fragment for table in tables for fragment in first_cells(table)]


def test_quoted_messages_exist_in_the_source():
    fragments, texts = quoted_messages(), list(messages())
    assert len(fragments) > 60
    for fragment in fragments:
        assert any(fragment in text for text in texts), fragment


def test_python_api_page_lists_every_error_once():
    errors = vars(seqkd.errors).values()
    names = [e.__name__ for e in errors if isinstance(e, type) and issubclass(e, Exception)]
    listed = re.findall(r"^::: seqkd\.errors\.(\w+)$", (DOCS / "python_api.md").read_text(), re.M)
    assert sorted(listed) == sorted(names)


def test_index_lists_every_command_once():
    page = (DOCS / "index.md").read_text()
    listed = [c.removeprefix("seqkd ") for c in first_cells(page.partition("## Commands")[2])]
    assert sorted(listed) == sorted(COMMANDS)


def test_choosing_page_lists_every_sampler_with_its_default_objective():
    page = (DOCS / "choosing.md").read_text().partition("## Samplers")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|.*\| `(\w+)` \|$", page, re.MULTILINE)
    assert dict(rows) == {name: traits.objective for name, traits in SAMPLERS.items()}


def test_navigation_lists_every_page_once():
    (nav,) = re.findall(r"^nav:\n(.*)", (ROOT / "mkdocs.yml").read_text(), re.M | re.S)
    pages = re.findall(r"(\w+\.md)$", nav, re.MULTILINE)
    assert sorted(pages) == sorted(file.name for file in DOCS.glob("*.md"))


def test_readme_is_short_and_links_every_page():
    text = README.read_text()
    assert len(text.splitlines()) <= 170
    linked = set(re.findall(r"\(docs/(\w+\.md)[)#]", text))
    assert linked == {file.name for file in DOCS.glob("*.md")} - {"index.md"}


def test_site_shows_links_to_files_outside_docs_as_paths():
    def page(text):
        return on_page_markdown(text)

    assert page("see [seqkd/types.py](../seqkd/types.py).") == "see `seqkd/types.py`."
    assert page("[dolly](../configs/recipes/dolly.yaml)") == "`configs/recipes/dolly.yaml`"
    assert page("[the loop](../seqkd/training/loop.py#L3)") == "the loop (`seqkd/training/loop.py`)"
    assert page("[teachers](teachers.md#an-endpoint)") == "[teachers](teachers.md#an-endpoint)"


def test_site_shows_references_in_docstrings_as_names():
    html = (
        "<p>from :func:<code>seqkd.load_config</code> and :class:<code>~seqkd.types.Counts</code>"
    )
    expected = "<p>from <code>load_config</code> and <code>Counts</code>"
    assert on_page_content(html) == expected


EXTERNAL = {
    **dict.fromkeys(("cat", "curl", "export", "kill", "mkdir", "source", "tar"), ""),
    **dict.fromkeys(("pip", ".venv/bin/pip", "python3"), "install"),
    **dict.fromkeys((".venv/bin/pre-commit", ".venv/bin/mkdocs", "mkdocs", "tensorboard"), ""),
    "ray": "cluster",
    "sbatch": "Slurm",
    "hf": "network",
    "lm_eval": "not .*run",
    "wandb": "log in",
}
"""Commands of other programs, which are not checked further, and a pattern that the page must
contain: what the command needs beyond a machine with 2 cores."""


def shell_commands(page):
    """Yield the words of all commands of a page, in code blocks and in inline code.

    Scripts, which begin with ``#!``, are not included: tests/unit/test_cluster_page.py runs them.
    """
    text = page.read_text()
    inline = r"(?<!`)`((?:seqkd|python|make|\.venv/bin/\w+) [^`…|]+)`"
    shell = [block for block in blocks(text, "bash") if not block.startswith("#!")]
    for block in [*shell, *re.findall(inline, re.sub(r"```.*?```", "", text, flags=re.DOTALL))]:
        block = re.sub(r"(<<'(\w+)'\n).*?^\2$", r"\n", block, flags=re.DOTALL | re.MULTILINE)
        block = re.sub(r"(^| )#.*$", "", block, flags=re.MULTILINE).replace("\\\n", " ")
        lexer = shlex.shlex(block, posix=True, punctuation_chars="&|;\n<>")
        lexer.whitespace, lexer.commenters, command = " \t", "", []
        for word in [*lexer, "\n"]:
            if not set(word) <= set("&|;\n"):
                command.append(word)
            elif command:
                yield [word for word in command if not re.fullmatch(r"[A-Z_]+=.*", word)]
                command = []


def check_command(words, page, folder):
    """Fail unless a command exists with its options, files and overrides."""
    program, *arguments = words
    if program == "seqkd":
        check_seqkd(arguments, folder)
    elif program == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        names = [a for a in arguments if "=" not in a]
        assert set(names) <= set(targets), words
    elif program in ("python", ".venv/bin/python"):
        check_python(arguments, folder)
    else:
        assert program in EXTERNAL, words
        assert re.search(EXTERNAL[program], page.read_text(), re.IGNORECASE | re.DOTALL), words


def check_seqkd(arguments, folder):
    command, *rest = arguments
    if command in ("--print-completion", "COMMAND"):
        return
    if not rest:  # the name of a command in a sentence
        assert command in COMMANDS, command
        return
    parser = argparse.ArgumentParser()
    COMMANDS[command].add_arguments(parser)
    args = parser.parse_intermixed_args(rest)
    file = str(getattr(args, "config", None) or getattr(args, "comparison", ""))
    if file.startswith("configs/"):
        assert (ROOT / file).is_file(), file
    if getattr(args, "overrides", None):
        config = ROOT / file if file.startswith("configs/") else folder / "minimal.yaml"
        (folder / "minimal.yaml").write_text(yaml.safe_dump(MINIMAL))
        load(config, args.overrides)


def check_python(arguments, folder):
    if arguments[0] == "-c":
        return
    module = arguments[arguments[0] == "-m"].removesuffix(".py").replace("/", ".")
    assert importlib.util.find_spec(module), module
    if module == "scripts.train":
        check_seqkd(["train", *arguments[1:]], folder)
    elif module.startswith(("scripts.", "tests.")):
        files = [ROOT / (module.replace(".", "/") + ".py")]
        source = "".join(file.read_text() for file in files)
        for option in arguments:
            assert not option.startswith("--") or f'"{option}"' in source, (module, option)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_valid(page, tmp_path):
    for words in shell_commands(page):
        check_command(words, page, tmp_path)


def test_references_in_docstrings_exist():
    pattern = re.compile(r":(?:class|func|mod|attr|data|meth):`~?((?:seqkd|actors)\.[\w.]+)`")
    for folder in ("seqkd", "actors", "scripts"):
        for file in (ROOT / folder).rglob("*.py"):
            for name in pattern.findall(file.read_text()):
                assert resolves(name.split(".")), f"{file}: {name}"


def resolves(parts):
    """Return whether a dotted name is a module, or an attribute or annotation of a module."""
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
