"""Users' text in every output: it is shown as text, and no format interprets it."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote_to_bytes
from xml.etree import ElementTree

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from seqkd import console
from seqkd.cli import evaluate
from seqkd.cli.inspect_data import format_tokens
from seqkd.comparison import plan, results
from seqkd.config.run import dump, load
from seqkd.escaping import markdown_block, printable
from seqkd.evaluation import offline, summary, table
from seqkd.evaluation.intervals import Interval
from seqkd.report import comparison_page, model_card, page, plots, run_page
from seqkd.storage import run_reader
from tests import pages
from tests.comparison_runs import write_comparison, write_evaluation
from tests.hostile import (
    HARMLESS,
    TEXTS,
    groups,
    hostile_run,
    hostile_runs,
    interpreted,
    with_codes,
    without,
)  # fmt: skip
from tests.report_runs import configuration

every_text = pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)


# Pages


class Parsed(HTMLParser):
    """Elements of a page with the names of their attributes, and its texts."""

    def __init__(self, content):
        super().__init__()
        self.structure, self.texts = [], []
        self.feed(content)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.structure.append((tag, [name for name, _ in attributes]))

    def handle_endtag(self, tag):
        self.structure.append(f"/{tag}")

    def handle_data(self, data):
        self.texts.append(data)

    def handle_comment(self, data):
        self.structure.append("comment")

    handle_decl = handle_pi = unknown_decl = handle_comment


def check_page(hostile, harmless, texts):
    """Check that two pages differ only in text, and that each of ``texts`` is in the first."""
    pages.check_that_nothing_runs_or_is_fetched(hostile)
    assert not any(map(interpreted, hostile))
    hostile.encode()
    assert Parsed(hostile).structure == Parsed(harmless).structure
    shown = "".join(Parsed(hostile).texts)
    for text in texts:
        assert with_codes(text) in shown, text


def test_page_of_runs(tmp_path):
    """Each run of a page has other texts, in every place."""
    hostile, harmless = (
        run_page.render(hostile_runs(tmp_path / name, texts), None)
        for name, texts in (("hostile", TEXTS), ("harmless", HARMLESS))
    )
    check_page(hostile, harmless, groups(TEXTS))
    shown = "".join(Parsed(hostile).texts)
    for number, text in enumerate(groups(TEXTS), 1):
        for line in (f"{number}. {with_codes(text)}", f"Seconds per step of {with_codes(text)}"):
            assert line in shown


def test_page_of_one_run(tmp_path):
    """All texts together are in every place of a page."""
    text = " / ".join(TEXTS.values())
    runs = (hostile_run(tmp_path / "a", text), hostile_run(tmp_path / "b", "harmless"))
    hostile, harmless = (run_page.render([run], 5.0) for run in runs)
    check_page(hostile, harmless, [text, f"Evaluation on {text}", f"{text} → student"])
    page.save(hostile, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == hostile


def test_page_of_a_comparison(tmp_path):
    """Methods, sets of prompts and completions have hostile texts. The names of comparisons and of
    methods cannot."""
    written = []
    for texts in (TEXTS, HARMLESS):
        parent = tmp_path / str(len(written))
        parent.mkdir()
        text = " / ".join(texts.values())
        methods = {"a": [f"data.system={json.dumps(text)}"], "b": []}
        comparison, entries = write_comparison(parent, methods, seeds=(0,))
        for entry in entries:
            write_evaluation(entry.directory, "named", {"student": {"rougeL": [3.0] * 11}})
        result = results.read(comparison, entries)
        result = replace(
            result,
            comparison=comparison.model_copy(update={"config": text, "overrides": (text,)}),
            tables=[replace(tables, name=text) for tables in result.tables],
            problems=[text],
            runs={
                key: replace(run, environment={text: text}, problems=[text])
                for key, run in result.runs.items()
            },
        )
        written.append(comparison_page.render(result, parent / "runs" / "study"))
    check_page(*written, [" / ".join(TEXTS.values())])


def test_links_to_directories_with_any_name(tmp_path):
    parent = tmp_path / 'javascript:"><b>\udcff%20\n?#'
    parent.mkdir()
    comparison, entries = write_comparison(parent, {"a": [], "b": []}, seeds=(0,))
    text = comparison_page.render(results.read(comparison, entries), tmp_path)
    links = [link for link in pages.links(text) if not link.startswith("#")]
    assert all(re.fullmatch(r"[\w.%/-]+", link) for link in links)
    targets = {tmp_path / os.fsdecode(unquote_to_bytes(link)) for link in links}
    assert targets == {entry.directory / "report.html" for entry in entries}


@pytest.mark.parametrize("text", [t for t in TEXTS.values() if "\n" not in t])
def test_plot_labels(tmp_path, text):
    """Phases are read from the rows if the configuration is missing."""
    run = replace(hostile_run(tmp_path, text), config=None)
    rows = [row | {"phase": f"{text}{row['step'] > 30}"} for row in run.rows]
    panel = plots.curve_panel([replace(run, rows=rows)], "loss")
    stages = plots.stage_panel("stages-0", text, *run_page.stage_seconds(run))
    for svg in (panel.svg, stages.svg):
        # the page replaces the characters that XML does not have
        plot = ElementTree.fromstring(printable(f'<a xmlns:xlink="x">{svg}</a>'))
        assert {e.tag for e in plot.iter()} <= {
            "a", "svg", "title", "desc", "g", "path", "text", "use", "defs", "clipPath", "rect",
        }  # fmt: skip
        assert not [name for e in plot.iter() for name in e.attrib if name.startswith("on")]
    labels = re.sub(r"\s", "", "|".join(ElementTree.fromstring(
        printable(f'<a xmlns:xlink="x">{panel.svg}</a>')).itertext()))  # fmt: skip
    for number in (False, True):
        assert re.sub(r"\s", "", with_codes(f"{text}{number}")) in labels


def test_pages_forbid_scripts_requests_and_forms(tmp_path):
    text = run_page.render([hostile_run(tmp_path, "x")], None)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)[1]
    rules = dict(rule.split(maxsplit=1) for rule in policy.split("; "))
    assert rules == {
        "default-src": "'none'", "style-src": "'unsafe-inline'", "img-src": "data:",
        "base-uri": "'none'", "form-action": "'none'",
    }  # fmt: skip
    assert text.index("Content-Security-Policy") < text.index("<title>")


# Model card


def card_of(tmp_path, monkeypatch, text):
    """Write a card with ``text`` in every field; return the file's content."""
    config = configuration(
        "x.__y__",
        student={"model": text},
        teacher={"kind": "openai", "model": text, "base_url": "http://localhost"},
        data={"path": "a/b", "split": text, "heldout_path": text, "system": text},
        sampler="teacher",
        extra_terms=[],
        warmup=None,
    )
    fields = dict.fromkeys(("license", "license_name", "license_link"), text)
    source = tmp_path / "source.md"
    source.write_text(f"---\n{yaml.safe_dump(fields)}---\n", encoding="utf-8")
    monkeypatch.setattr("transformers.utils.hub.cached_file", lambda *_, **__: str(source))
    (tmp_path / "student").mkdir(parents=True, exist_ok=True)
    (tmp_path / "metrics.jsonl").write_text("")
    model_card.write(tmp_path, config, None)
    return (tmp_path / "student" / "README.md").read_text(encoding="utf-8")


def markdown(text):
    """Parse Markdown; return its tokens in order."""
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    return [inner for token in tokens for inner in (token, *(token.children or ()))]


def structure(tokens):
    return [(token.type, token.tag, token.attrs) for token in tokens]


@every_text
def test_model_card(tmp_path, monkeypatch, text):
    content = card_of(tmp_path, monkeypatch, text)
    assert not any(map(interpreted, content))
    card = ModelCard(content)
    front, body = yaml.safe_load(card.data.to_yaml()), markdown(card.text)
    harmless = ModelCard(card_of(tmp_path, monkeypatch, "harmless, text"))
    assert front.keys() == harmless.data.to_dict().keys()
    for key in ("license", "license_name", "license_link"):
        assert front[key] == with_codes(text)
    assert structure(body) == structure(markdown(harmless.text))
    spans = [t.content for t in body if t.type == "code_inline"]
    line = with_codes(text).replace("\n", "\\n")
    name = with_codes(Path(text).name).replace("\n", "\\n")
    assert spans[0] == "x.__y__" and spans.count(line) >= 3 and name in spans
    (block,) = [t.content for t in body if t.type == "fence" and t.info == "yaml"]
    options = yaml.safe_load(block)
    assert options["data"]["system"] == options["student"]["model"] == text


@pytest.mark.parametrize("name", ["_a_/_b_", "a.__b__", "a/b_c_.d", "1", "null", "ä/ö"])
def test_hub_names_in_the_card(tmp_path, monkeypatch, name):
    config = configuration("x", student={"model": name})
    monkeypatch.setattr(model_card, "license_of", lambda model: {})
    (tmp_path / "student").mkdir()
    (tmp_path / "metrics.jsonl").write_text("")
    model_card.write(tmp_path, config, None)
    card = ModelCard.load(tmp_path / "student" / "README.md")
    hub = model_card.hub_name(name)
    assert card.data.to_dict().get("base_model") == hub
    tokens = markdown(card.text)
    kinds = {t.type for t in tokens if t.type not in ("text", "softbreak")}
    assert not kinds & {"em_open", "strong_open", "html_inline", "image"}
    if hub:
        assert name in [t.content for t in tokens if t.type == "code_inline"]


@pytest.mark.parametrize("text", ["a: b\n", "```\n# c\n", "~~~\n   `````\n*d*\n"])
def test_markdown_block(text):
    (token,) = markdown(markdown_block(text, "yaml"))
    assert (token.type, token.info, token.content) == ("fence", "yaml", text)


# YAML and JSON


@every_text
def test_configuration_of_a_run(tmp_path, text):
    config = configuration("x", data={"path": text, "heldout_path": text, "system": text})
    content = dump(config)
    assert not any(map(interpreted, content))
    assert yaml.safe_load(content).keys() == config.model_dump().keys()
    (tmp_path / "config.yaml").write_text(content, encoding="utf-8")
    assert load(tmp_path / "config.yaml") == config


@every_text
def test_paths_in_overrides(tmp_path, text):
    """Commands set paths with overrides, whose values are YAML."""
    config = configuration("x", extra_terms=[], warmup=None).model_dump(mode="json")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    arguments = {"what": text, "prompts": text, "config": str(tmp_path / "config.yaml"), "limit": 1}
    options = {"samples": 1, "overrides": [], "out": tmp_path, "bart": None}
    request = evaluate.read_request(argparse.Namespace(**arguments, **options))
    assert request.models == {"student": text}
    assert request.config.student.model == request.config.data.heldout_path == text
    plan_file = {"name": "study", "config": "config.yaml", "runs_dir": text, "methods": METHODS,
                 "budget": {"kind": "prompts", "amount": 1}, "seeds": [10]}  # fmt: skip
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(plan_file))
    comparison = plan.load(tmp_path / "study.yaml")
    for entry in plan.entries(comparison, tmp_path / "study.yaml"):
        assert entry.config.name == f"{entry.method}-10"
        assert entry.config.runs_dir == str(Path(text) / "study")
        assert load(entry.arguments[0], entry.arguments[1:]) == entry.config


METHODS = {"a": [], "2026-01": []}
"""Methods of a comparison. The name of a run of the second one is a date in YAML."""


@every_text
def test_json_files(tmp_path, text):
    """Files are UTF-8, have one line per object for every reader, and can be printed."""
    content = {"source": text, text: [text]}
    run_reader.write_evaluation(tmp_path, content)
    written = (tmp_path / "evaluation.json").read_text(encoding="utf-8")
    assert json.loads(written) == run_reader.read_evaluation(tmp_path) == content
    assert not any(map(interpreted, written))
    prompts = [SimpleNamespace(prompt_id=str(i), text=text) for i in range(3)]
    rollouts = [SimpleNamespace(prompt_id=p.prompt_id, completion_ids=(1,), finish_reason="length")
                for p in prompts]  # fmt: skip
    outputs = {text: SimpleNamespace(answers=SimpleNamespace(rollouts=rollouts))}
    held_out = offline.PromptSet(prompts, [(text,)] * 3, lambda ids: text, len, 9)
    offline.write(tmp_path, content, outputs, held_out)
    lines = (tmp_path / "generations.jsonl").read_text(encoding="utf-8").splitlines()
    row = {"prompt": text, "references": [text], text: [text]}
    assert [json.loads(line) for line in lines] == [row] * 3
    assert not any(map(interpreted, "".join(lines)))
    assert json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8")) == content


def test_readable_text_is_not_escaped_in_files(tmp_path):
    run_reader.write_evaluation(tmp_path, {"a": "déjà vu 漢字 😀"})
    assert "déjà vu 漢字 😀" in (tmp_path / "evaluation.json").read_text(encoding="utf-8")
    config = configuration("x", data={"path": "a", "heldout_path": "b", "system": "漢字 😀"})
    assert "漢字 😀" in dump(config)


# Terminal and logs


class Terminal(io.StringIO):
    """A file that claims to be a terminal."""

    def isatty(self):
        return True


def printed(file, text):
    """Print ``text`` in every form; return the output."""
    interval = Interval(1.0, 0.5, 1.5)
    figures = {"reverse_kl_per_token": vars(interval)}
    evaluation = {
        "prompts": text,
        "figures": {"initial": figures, text: figures},
        "changes": {"reverse_kl_per_token": {f"{text} -> b": vars(interval)}},
        "examples": [{"prompt": text, "completions": {text: text}}],
    }
    console.show(text, console.table([[text, text]], [text, text]), file=file)
    console.show(table.render({text: {"length": interval}}), file=file)
    console.show(*summary.render(evaluation), file=file)
    console.show(summary.closing(Path(text), {text: 1.0}, 2.0), file=file)
    for level in console.STYLES:
        console.print_message(level, text, file=file)
    progress = console.Progress(file)
    progress.wait(text)
    progress.begin(text)
    progress.step(text, 1, 2, text, 1.0)
    progress.note(text)
    progress.step(text, 2, 2, text, 1.0)
    progress.close()
    return file.getvalue()


SEQUENCE = r"\x1b\[[0-9;?]*[A-Za-z]"


@every_text
@pytest.mark.parametrize("kind", [io.StringIO, Terminal], ids=["log", "terminal"])
def test_terminal_and_log(monkeypatch, kind, text):
    """The only control characters are those that every progress display has."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "200")
    output = printed(kind(), text)
    expected = set(re.findall(SEQUENCE, printed(kind(), "harmless")))
    assert bool(expected) == (kind is Terminal)
    assert set(re.findall(SEQUENCE, output)) <= expected
    rest = re.sub(SEQUENCE, "", output).replace("\r", "" if kind is Terminal else "\r")
    assert not [c for c in rest if interpreted(c)]
    for line in without(text).splitlines():
        assert " ".join(line.split()) in " ".join(rest.split())


@every_text
def test_tokens_in_the_terminal(text):
    tokenizer = SimpleNamespace(
        all_special_ids=[], decode=lambda ids, clean_up_tokenization_spaces: text * len(ids)
    )
    for color in (False, True):
        assert not any(map(interpreted, format_tokens([1], [], tokenizer, "dim", color).plain))


def test_commands_to_copy_are_quoted(tmp_path):
    """The command for TensorBoard opens the directory of the run and runs nothing else."""
    for name in ("a b", "$(touch x)", "`touch x`; touch y", "a'b"):
        command = summary.closing(tmp_path / name, {}, 1.0).splitlines()[-1].split(": ", 1)[1]
        assert shlex.split(command) == ["tensorboard", "--logdir", f"{tmp_path}/{name}/tensorboard"]
