"""Texts that a format would interpret if they were not escaped, and outputs that contain them."""

from __future__ import annotations

import json
import unicodedata
from dataclasses import replace

from seqkd.evaluation.summary import Completions
from seqkd.storage.run_reader import read
from tests.report_runs import configuration, write_run

BIDI = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
TEXTS = {
    "script": '</script><script>alert(1)</script></pre></style><img src=x onerror="alert(1)">',
    "attribute": '" onmouseover="alert(1)" x=\'" autofocus onfocus=alert(1) \'>',
    "comment": "--><svg onload=alert(1)><!-- ]]><![CDATA[ <?xml ?>",
    "entity": "&lt;b&gt; &amp;amp; &#60;i&#62;",
    "template": "{{ 7 * 7 }}{% if x %}{# y #}",
    "plot": ' id="x" d="1.23456" #010203 font: 10px a; href="#x" <style>',
    "formula": r"$\frac{1}{$ $x^2$ \n",
    "document": "a\n---\nlicense: mit\n...\n--- !x\n",
    "value": "- x: [y, {z: \"q\", 'w'}] # c &a *a !!python/object:os.system",
    "link": "[a](http://x.example) ![b](http://x.example/b.png) <http://x.example> www.x.example",
    "block": "\n\n# heading\n\n| a | b |\n|---|---|\n| c | d |\n\n> e\n\n- [ ] f\n\n<b>\n",
    "fence": "\n```\n# heading\n````\n~~~\n",
    "backtick": "`` ` ``` b *c* _d_ `",
    "pipe": "a | b \\| c \\",
    "hyperlink": "\x1b]8;;http://x.example\x1b\\click\x1b]8;;\x07 \x1b]0;title\x07",
    "color": "\x1b[31mred\x1b[2J\x1b[H \x9b31m \x85 \x7f \x08\x08 \x1bP1;1|x\x1b\\",
    "direction": " ".join(BIDI),
    "zero": "a\x00b\r\nc\rd\x0be\x0cf\x1cg",
    "surrogate": "\ud800 \udcff \udfff",
    "line": '"}\n{"step": 0, "loss": 1}\n\u2028{"step": 1}\u2029',
    "letters": "\u00e9 \u6f22\u5b57 \U0001f600 \u0639\u0631\u0628\u064a",
    "markup": "[bold]a[/bold] :smile: [link=http://x.example]b[/link]",
}
"""Hostile texts by the syntax that they use."""
HARMLESS = {name: f"the {name} text" for name in TEXTS}


def interpreted(character):
    """Return whether a terminal interprets a character, or a line-based reader or a bidirectional
    layout does. Tab and line feed are kept everywhere."""
    kept = character in "\t\n"
    category = unicodedata.category(character)
    return not kept and (category in ("Cc", "Cs", "Zl", "Zp") or character in BIDI)


def with_codes(text):
    """Return the text with the code of each interpreted character, as pages show it."""
    return "".join(ascii(c)[1:-1] if interpreted(c) else c for c in text)


def without(text):
    """Return the text without interpreted characters, as terminals show it."""
    return "".join(c for c in text if not interpreted(c))


def hostile_run(parent, text, index=0):
    """Return a run with few steps that has ``text`` wherever a run can have the user's text."""
    directory = write_run(parent, f"run-{index}")
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    keys = ("step", "phase", "loss", "length", "tokens", "time_step_s")
    (directory / "metrics.jsonl").write_text(
        "".join(json.dumps({key: row[key] for key in keys}) + "\n" for row in rows)
    )
    run = read(directory)
    assert run.evaluation
    tokens = [(text, 0.5), (text, None)]
    authors = ("teacher", "student after")
    example = Completions("one prompt", dict.fromkeys(authors, text), {"teacher": tokens})
    other = Completions(text, dict.fromkeys((*authors, text), text), {text: tokens})
    one = run.evaluation.figures["main"]
    evaluation = replace(run.evaluation, interval=text, examples=[example, other])
    evaluated = replace(
        evaluation,
        figures={text: one, "teacher": one},
        changes={"length": {f"{text} -> student": one["student_length"]}},
    )
    encodable = text.encode(errors="replace").decode()  # the key has a pattern, which requires it
    config = configuration(
        "x",
        seed=index,
        student={"model": text},
        teacher={"kind": "openai", "model": text, "base_url": f"http://localhost/{encodable}"},
        data={"path": text, "heldout_path": text, "system": text},
        sampler="teacher",
        extra_terms=[],
        warmup=None,
        runs_dir=text,
    )
    environment = {"started": text, "system": text, text: text, "gpus": [text, text]}
    return replace(
        run,
        directory=directory / text.replace("/", "_"),
        name=text,
        config=config,
        config_text=text,
        rows=[row | {"phase": text} for row in run.rows],
        evaluation=evaluation,
        evaluated={text: evaluated},
        environment=environment | {"packages": {text: text}},
        problems=[text],
    )


def groups(texts):
    """Return the texts as a few long ones."""
    return [" / ".join([*texts.values()][start::4]) for start in range(4)]


def hostile_runs(parent, texts):
    """Return runs of one page that have all ``texts``."""
    return [hostile_run(parent, text, index) for index, text in enumerate(groups(texts))]
