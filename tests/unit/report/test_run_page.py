"""The page of runs: reading, computation, texts and structure."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from seqkd import report
from seqkd.cli import report as command
from seqkd.cli.main import main
from seqkd.errors import DataError, StorageError
from seqkd.evaluation.intervals import Interval
from seqkd.evaluation.summary import closing
from seqkd.report import curves, page, run_page, samples, wording
from seqkd.report.svg import Key
from seqkd.storage import run_directory
from seqkd.storage.run_reader import read
from tests import pages
from tests.conftest import ROOT
from tests.report_runs import (
    HOSTILE,
    MAIN,
    SKIPPED,
    WARMUP,
    configuration,
    evaluation,
    replace_yaml,
    write_run,
)


@pytest.fixture
def directory(tmp_path):
    return write_run(tmp_path)


@pytest.fixture
def few(directory):
    """Directory of a run with few columns, whose page renders faster."""
    names = ("step", "phase", "loss", "length", "tokens", "time_step_s")
    rows = [json.loads(line) for line in lines_of(directory)]
    keep(directory, [json.dumps({n: row[n] for n in names}) + "\n" for row in rows], True)
    return directory


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Page of a finished run."""
    directory = write_run(tmp_path_factory.mktemp("finished"))
    assert report.write([directory], directory / "report.html")
    return (directory / "report.html").read_text()


def lines_of(directory):
    return (directory / "metrics.jsonl").read_text().splitlines(keepends=True)


def keep(directory, lines, evaluation=False):
    """Keep only some rows of metrics.jsonl."""
    (directory / "metrics.jsonl").write_text("".join(lines))
    if not evaluation:
        (directory / "evaluation.json").unlink(missing_ok=True)


# Reading run directories


def test_a_finished_run(directory):
    run = read(directory)
    assert run.state == "finished" and run.over and not run.problems
    assert [(s.name, s.begin, s.end) for s in run.spans] == [("warmup", 0, 20), ("main", 20, 60)]
    assert {stage: step for stage, (step, _) in run.figures.items()} == {
        "initial": 0, "warmup": 20, "main": 60,
    }  # fmt: skip


def test_states_of_a_run(directory):
    lines, all_there = lines_of(directory), (directory / "evaluation.json").read_text()
    with run_directory.lock(directory):
        keep(directory, [])
        assert read(directory).state == "starting"
        keep(directory, lines[:30])
        assert read(directory).state == "running"
        keep(directory, lines)
        assert read(directory).state == "measuring on held-out prompts"
        (directory / "evaluation.json").write_text(all_there)  # from before an extension
        assert not read(directory).over
    assert read(directory).over
    keep(directory, lines)
    assert read(directory).state == "stopped before the last measurement"
    keep(directory, lines[:30])
    assert read(directory).state == "stopped"
    replace_yaml(directory, evaluation={"prompts": 0})
    assert not read(directory).over
    keep(directory, lines)
    assert read(directory).over


def test_figures_from_before_an_extension_are_noted(few):
    replace_yaml(few, steps=MAIN + 10)
    run = read(few)
    assert list(run.figures) == ["initial", "warmup"] and not run.over
    table = run_page.last_figures([run], [Key(0, "1. mixed")])
    assert dict(map(tuple, table.rows))["reverse KL per token (nats)"].mean == 1.01  # after warmup
    assert "is from before this run was extended" in run_page.render([run], None)


def test_damaged_rows_are_counted_and_omitted(few):
    lines = lines_of(few)
    damaged = [lines[0], "{broken\n", "[1]\n", '{"step": "x"}\n', lines[0], *lines[1:5]]
    keep(few, [*damaged, lines[5][:40]])  # the last line is still being written
    run = read(few)
    assert [row["step"] for row in run.rows] == [0, 1, 2, 3, 4]
    assert run.problems == ["metrics.jsonl: 4 damaged rows are omitted."]
    assert "4 damaged rows" in run_page.render([run], None)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("evaluation.json", '{"prompts": 3', "evaluation.json: is damaged and omitted"),
        ("evaluation.json", "[]", "evaluation.json: is damaged and omitted"),
        ("evaluation.json", '{"prompts": 3, "figures": []}', "evaluation.json: is damaged"),
        ("environment.json", "3", "environment.json: is damaged and omitted"),
        ("config.yaml", "steps: [", "config.yaml"),
        ("config.yaml", "steps: 3\nstudnet: x\n", "config.yaml"),
        ("metrics.jsonl", "", "No step is recorded yet"),
        ("metrics.jsonl", None, "metrics.jsonl: no such file."),
        ("evaluation.json", None, "There are no held-out figures"),
        ("environment.json", None, "There is no environment.json"),
        ("config.yaml", None, "config.yaml: no such file."),
    ],
)
def test_page_with_a_missing_or_damaged_file(few, name, content, words):
    (few / name).unlink()
    if content is not None:
        (few / name).write_text(content)
    text = run_page.render([read(few)], None)
    assert words in text
    shown = {
        "config.yaml": "Resolved configuration",
        "metrics.jsonl": "Completion length",
        "evaluation.json": "Held-out figures",
        "environment.json": "Linux 6.1 x86_64",
    }
    for other, mark in shown.items():
        if other != name:
            assert mark in text, other
    assert ("<h2>Curves</h2>" in text) == (name != "metrics.jsonl")


def test_phases_are_read_from_rows_without_a_configuration(directory):
    (directory / "config.yaml").write_text("unknown: 1\n")
    run = read(directory)
    assert [(s.name, s.begin, s.end) for s in run.spans] == [("warmup", 0, 20), ("main", 20, 60)]
    assert run.config is None and run.total is None and run.over and run.name == "mixed"


@pytest.mark.parametrize("arguments", [["{}/nothing"], ["{}"], ["{}", "{}/mixed"]])
def test_other_directories_are_refused(directory, arguments, capsys):
    names = [name.format(directory.parent) for name in arguments]
    assert main(["report", *names, "--out", str(directory / "page.html")]) == 2
    message = capsys.readouterr().err
    assert re.match(
        r"error: .*is not a run directory: .*Pass a directory written by seqkd train", message
    )
    assert not (directory / "page.html").exists()


def test_a_page_that_cannot_be_written(few):
    with pytest.raises(StorageError, match=r"no/page\.html: cannot be written"):
        report.write([few], few / "no" / "page.html")
    with pytest.raises(DataError):
        report.write([few / "no"], few / "page.html")


# Computation


def test_a_moving_mean_by_hand():
    smooth = curves.moving_mean(np.array([1.0, 2.0, 6.0, 4.0]), 1)
    assert smooth.tolist() == [1.5, 3.0, 4.0, 5.0]
    assert curves.moving_mean(np.array([1.0, 5.0]), 0).tolist() == [1.0, 5.0]


def test_curves_end_with_the_phase_and_omit_missing_values(directory):
    run = read(directory)
    warmup, main = curves.curves(run, "reverse_kl_per_token", np.arange(60.0))
    assert warmup.x.tolist() == list(range(WARMUP)) and warmup.window == 3
    assert main.x.tolist() == [s for s in range(WARMUP, 60) if s != SKIPPED]
    assert main.window == 3  # 39 // 20 on either side
    values = [row["reverse_kl_per_token"] for row in run.rows]
    assert warmup.y[-1] == pytest.approx((values[18] + values[19]) / 2)
    assert main.y[0] == pytest.approx((values[20] + values[21]) / 2)
    assert next(curves.curves(run, "mean_weight", np.arange(60.0))).x[0] == WARMUP


def test_peaks_are_kept_with_many_steps(directory):
    replace_yaml(directory, steps=4000, warmup=None)
    values = np.sin(np.arange(4000)).tolist()
    values[1234] = 50.0
    rows = [{"step": i, "phase": "main", "loss": v} for i, v in enumerate(values)]
    keep(directory, [json.dumps(row) + "\n" for row in rows])
    (curve,) = curves.curves(read(directory), "loss", np.arange(4000.0))
    assert len(curve.x) <= curves.POINTS and curve.window == 14
    peak = int(np.argmax(curve.high))
    assert curve.high[peak] == 50 and abs(curve.x[peak] - 1234) < 14
    assert curve.low.min() == min(values)
    assert curve.y[0] == pytest.approx(np.mean(values[: len(values) // len(curve.x) + 1]), abs=0.2)


def test_cumulative_costs_by_hand(directory):
    rows = [
        {"step": 0, "learner_tokens": 10, "teacher_tokens": 7, "time_step_s": 60.0},
        {"step": 1, "learner_tokens": 25, "teacher_tokens": 9, "time_step_s": 120.0},
        {"step": 3, "learner_tokens": 40, "time_step_s": None},
    ]
    keep(directory, [json.dumps(row) + "\n" for row in rows])
    run = read(directory)
    assert curves.spent(run, "learner_tokens").tolist() == [0, 10, 35, 75]
    assert curves.spent(run, "teacher_tokens").tolist() == [0, 7, 16, 16]
    assert curves.spent(run, "seconds").tolist() == [0, 1, 3, 3]  # in minutes
    assert curves.spent(run, "steps").tolist() == [0, 1, 3, 4]
    assert curves.spent_before(run, "learner_tokens", 4) == 75
    assert curves.spent_before(run, "learner_tokens", 2) == 22.5  # the row of step 2 is missing


def test_the_stages_by_hand(directory):
    rows = [
        {"step": 0, "time_sample_s": 3.0, "time_learn_s": 5.0, "time_step_s": 10.0},
        {"step": 1, "time_sample_s": 1.0, "time_learn_s": 1.0, "time_step_s": 2.0},
        {"step": 2, "loss": 1.0},
    ]
    keep(directory, [json.dumps(row) + "\n" for row in rows])
    steps, stages = run_page.stage_seconds(read(directory))
    assert list(stages) == ["sync", "sample", "score", "watch", "learn", "other"]
    assert steps.tolist() == [0, 1] and stages["other"].tolist() == [2, 0]
    ((name, table, panel),) = run_page.times([read(directory)])
    rows = {key.label: cells for key, *cells in table.rows}
    assert name == "mixed" and [key.index for key, *_ in table.rows] == list(range(6))
    assert (rows["sample"][0], rows["learn"][0], rows["other"][0]) == ("4.0 s", "6.0 s", "2.0 s")
    assert rows["learn"][1:] == ["50.0 %", "3.000 s"]
    assert "sample: 2 s on average" in panel.svg


# Texts


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ((-0.5, -0.9, -0.1), "−0.5 [−0.9, −0.1], lower"),
        ((0.5, 0.1, 0.9), "+0.5 [+0.1, +0.9], higher"),
        ((0.5, -0.1, 0.9), "+0.5 [−0.1, +0.9], not significant"),
        ((0.0, 0.0, 0.0), "+0 [+0, +0], not significant"),
    ],
)
def test_change_with_its_direction(change, words):
    assert wording.change(Interval(*change)) == words


@pytest.mark.parametrize(
    ("seconds", "words"), [(3.14159, "3.14 s"), (184, "3 min 4 s"), (7500, "2 h 5 min")]
)
def test_durations(seconds, words):
    assert wording.duration(seconds) == words


def test_headlines_have_length_and_eos_rate_next_to_divergence(directory):
    content = run_page.headlines(read(directory))
    assert list(content) == [
        "reverse_kl_per_token", "forward_kl_per_token", "student_length", "student_eos_rate",
    ]  # fmt: skip
    before, after, details = content["reverse_kl_per_token"]
    assert (before.mean, after.mean) == (2.22, 0.822)
    assert details == [
        "before 2.22 [2.16, 2.29]",
        "after 0.822 [0.762, 0.888]",
        "change −1.4 [−1.49, −1.3], lower",
    ]
    assert content["student_length"][2][-1] == "teacher 32.7 [30.6, 35]"


def test_figures_on_other_prompts(few):
    file = few / "evaluation" / "selfinst" / "evaluation.json"
    file.parent.mkdir(parents=True)
    one = {"mean": 21.5, "low": 19.25, "high": 23.75}
    change = {"mean": 4.5, "low": 2.0, "high": 7.0}
    content = {
        "prompts": 252,
        "figures": {"teacher": {"rougeL": one, "distinct1": dict.fromkeys(one, 0.125)},
                    "student": {"rougeL": one}},
        "changes": {"rougeL": {"initial -> student": change}},
    }  # fmt: skip
    file.write_text(json.dumps(content))
    ((name, (prompts, _, (figures, changes))),) = run_page.evaluated(read(few)).items()
    assert (name, prompts, figures.heads) == ("selfinst", 252, ["Figure", "teacher", "student"])
    assert figures.rows == [
        ["ROUGE-L (0 to 100)", *[Interval(**one)] * 2],
        ["distinct-1 (share)", Interval(0.125, 0.125, 0.125), None],
    ]
    ((label, pair, words),) = changes.rows
    assert (label, pair) == ("ROUGE-L (0 to 100)", "initial → student") and "4.5" in words
    warn(file, student=WARNING)
    text = run_page.render([read(few)], None)
    assert text.index('id="evaluated-1"') < text.index(WARNING[:30]) < text.index("ROUGE-L")
    assert 'href="#evaluated-1"' in text and "21.5" in text and "[0.125" not in text
    file.write_text("{")
    run = read(few)
    assert run.evaluated == {}
    assert any(
        p.startswith("evaluation/selfinst/evaluation.json: is damaged") for p in run.problems
    )


WARNING = "student completions are 15.5 tokens shorter than the teacher's"


def warn(file, **warnings):
    """Add warnings to an evaluation.json."""
    file.write_text(json.dumps(json.loads(file.read_text()) | {"warnings": warnings}))


def test_warning_about_length_is_red_and_next_to_the_divergence(few):
    warn(few / "evaluation.json", main=WARNING)
    text = run_page.render([read(few)], None)
    warning = f"<strong>Warning:</strong> {WARNING.replace(chr(39), '&#39;')}</p>"
    (summary,) = re.findall(r'<section class="headlines".*?</section>', text, re.DOTALL)
    before, after = summary.split(f'<p class="warning">{warning}')
    assert "<div>" not in before and "Reverse KL per token" in after[:80], "directly above it"
    assert text.count("Warning:") == 1
    (rule,) = re.findall(r"^\.warning \{(.*)\}$", text, re.MULTILINE)
    assert "color: var(--warning)" in rule
    pages.check_colors(text)


def test_warning_is_about_the_last_measured_student(few):
    warn(few / "evaluation.json", warmup=WARNING)
    assert read(few).warnings == []
    warn(few / "evaluation.json", main=WARNING)
    assert read(few).warnings == [WARNING]
    replace_yaml(few, steps=MAIN + 10)
    assert read(few).warnings == [], "the run was extended; main is not measured yet"
    assert "Warning:" not in run_page.render([read(few)], None)


def test_warnings_of_several_runs_have_their_names(tmp_path):
    paths = [write_run(tmp_path), write_run(tmp_path, "other", draw=1)]
    warn(paths[1] / "evaluation.json", main=WARNING)
    text = run_page.render([read(path) for path in paths], None)
    (section,) = re.findall(r'<section id="held-out">.*?</section>', text, re.DOTALL)
    warning = section.index(f"<strong>Warning:</strong> other: {WARNING[:30]}")
    assert warning < section.index("reverse KL per token") and text.count("Warning:") == 1


def test_figures_within_a_phase_are_only_plotted(few):
    file = few / "evaluation.json"
    content = json.loads(file.read_text())
    figures = content["figures"]
    content["figures"] = {"initial": figures["initial"], "step 7": figures["main"], **figures}
    file.write_text(json.dumps(content))
    run = read(few)
    assert run.figures["step 7"][0] == 7
    assert run_page.held_out(run)[0].heads == ["Figure", "before", "after warmup", "after main"]


def test_several_runs_and_their_differences(tmp_path):
    paths = [
        write_run(tmp_path),
        write_run(tmp_path, "other-seed", draw=1, offset=0.1, seed=1),
        write_run(tmp_path, "token-level", draw=2, objective={"kind": "token_reverse_kl"}),
    ]
    runs = [read(path) for path in paths]
    keys = [Key(index, f"{index + 1}. {run.name}") for index, run in enumerate(runs)]
    assert page.differing([run.config for run in runs], keys).rows == [
        ["objective.kind", "sequence_reverse_kl", "sequence_reverse_kl", "token_reverse_kl"],
        ["seed", "0", "1", "0"],
    ]
    without = read(write_run(tmp_path, "no-warmup", warmup=None, steps=60))
    assert page.differing([runs[0].config, without.config], keys[:2]).rows == [
        ["steps", "40", "60"],
        ["warmup", "set", "None"],
    ]
    table = run_page.last_figures(runs, keys)
    assert [row[0] for row in table.rows][:4] == [
        "reverse KL per token (nats)", "forward KL per token (nats)",
        "completion length (tokens)", "EOS rate (share)",
    ]  # fmt: skip
    assert table.heads == ["Figure", *keys]
    assert [value.mean for value in table.rows[0][1:]] == [0.822, pytest.approx(0.922), 0.822]
    text = run_page.render(runs, None)
    (plot,) = re.findall(r'<svg[^>]*aria-labelledby="loss-steps-title.*?</svg>', text, re.DOTALL)
    for number in (1, 2, 3):
        assert f"var(--series-{number})" in plot
    assert "var(--series-4)" not in plot
    examples = samples.side_by_side({key.label: run for key, run in zip(keys, runs, strict=True)})
    assert list(examples[0][1]) == ["teacher", "1. mixed", "2. other-seed", "3. token-level"]


@pytest.mark.parametrize(
    ("kl", "level"), [(0, 0), (0.099, 0), (0.1, 1), (0.5, 2), (1, 3), (2, 4), (3.99, 4), (4, 5)]
)
def test_token_color_depends_on_the_divergence(kl, level):
    assert samples.level(float(kl)) == f"kl-{level}"
    assert samples.level(None) == ""


def test_invisible_tokens_are_marked():
    tokens = ["", "\n", " b", "c"]
    assert [samples.visible(token) for token in tokens] == ["·", "↵\n", " b", "c"]


def test_completions_without_tokens_are_plain(few):
    content = json.loads((few / "evaluation.json").read_text())
    for example in content["examples"]:
        del example["tokens"]
    (few / "evaluation.json").write_text(json.dumps(content))
    text = run_page.render([read(few)], None)
    assert "The capital of France is Paris, a city on the river Seine." in text
    article = text[text.index("<article>") :]
    assert 'class="token' not in article


# Structure


def test_page_runs_and_fetches_nothing(text):
    assert HOSTILE not in text and "&lt;script&gt;document.title" in text
    assert pages.links(text) == {"#held-out", "#samples", "#curves", "#time", "#setup"}
    pages.check_that_nothing_runs_or_is_fetched(text)


def test_plots_are_well_formed_and_labeled(text):
    assert pages.check_plots(text) == 22 + 4 + 1, "metrics, divergences by cost, stages"


def test_colors_are_defined_for_light_and_dark(text):
    pages.check_colors(text)


def luminance(color):
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    """Return the contrast ratio of WCAG 2, which requires 4.5 for text and 3 for graphics."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_contrast_of_text_and_curves(scheme):
    style = (ROOT / "seqkd" / "report" / "templates" / "style.css").read_text()
    block = re.findall(r":root \{(.*?)\}", style, re.DOTALL)[scheme]
    color = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))
    for level in range(1, 6):
        assert contrast(color["ink"], color[f"kl-{level}"]) >= 4.5, level
    for back in ("paper", "band", "soft"):
        assert contrast(color["ink"], color[back]) >= 7
        assert contrast(color["muted"], color[back]) >= 4.5
        assert contrast(color["warning"], color[back]) >= 4.5
        for number in range(1, 7):
            assert contrast(color[f"series-{number}"], color[back]) >= 4.5, (number, back)


def test_headings_go_down_one_level_at_a_time(text):
    headings = pages.check_headings(text)
    assert [name for level, name in headings if level == 2][4:] == [
        "Held-out figures", "Samples side by side", "Curves", "Time by stage",
        "Configuration and environment",
    ]  # fmt: skip


def test_recorded_metrics_are_plotted(text):
    for name in (
        "loss", "reverse-kl-per-token", "forward-kl-per-token", "length", "eos-rate", "lr",
        "truncation-rate", "entropy-per-token", "repetition", "grad-norm", "logprob-gap-mean",
        "logprob-gap-max", "k1-per-token", "k3-per-token", "ratio-mean", "mean-weight",
        "ratio-effective-sample-size", "effective-sample-size", "teacher-samples", "tokens-per-s",
        "student-logprob-per-token", "teacher-logprob-per-token",
    ):  # fmt: skip
        assert f'id="{name}-steps-title"' in text, name
    for on in ("learner-tokens", "seconds"):
        assert f'id="reverse-kl-per-token-{on}-title"' in text
    assert "dataset samples" in text


def test_numbers_of_any_size_are_plotted(directory):
    values = [1e-300, 1e300, -1e300, 0.0, None, 5e-324]
    rows = [{"step": i, "phase": "warmup", "loss": v, "lr": 0.0} for i, v in enumerate(values)]
    keep(directory, [json.dumps(row) + "\n" for row in rows])
    assert 'id="loss-steps-title"' in run_page.render([read(directory)], None)
    keep(directory, [json.dumps({"step": 0, "phase": "warmup", "loss": 2.5}) + "\n"])
    assert "from 2.5 to 2.5" in run_page.render([read(directory)], None)
    assert math.isfinite(read(directory).seconds)


# Watching a run


def test_watched_page_follows_a_run_to_its_end(few, monkeypatch, capsys):
    lines, whole = lines_of(few), (few / "evaluation.json").read_text()
    out, pages = few / "report.html", []
    keep(few, lines[:30])

    def meanwhile(seconds):
        assert seconds == 7
        pages.append(out.read_text())
        if len(pages) == 1:
            keep(few, lines)
        else:
            (few / "evaluation.json").write_text(whole)

    monkeypatch.setattr(command.time, "sleep", meanwhile)
    assert main(["report", str(few), "--watch", "7"]) == 0
    assert capsys.readouterr().out == f"report: {out}\n"
    assert len(pages) == 2
    for shown in pages:
        assert '<meta http-equiv="refresh" content="7">' in shown
    assert "30 of 60" in pages[0]
    last = out.read_text()
    assert 'http-equiv="refresh"' not in last
    assert "finished" in last and "60 of 60" in last


def test_interrupted_watch_leaves_a_page_that_does_not_reload(few, monkeypatch):
    keep(few, lines_of(few)[:30])

    def interrupted(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(command.time, "sleep", interrupted)
    assert main(["report", str(few), "--watch", "7"]) == 0
    assert 'http-equiv="refresh"' not in (few / "report.html").read_text()


@pytest.mark.parametrize("value", ["0", "-3", "0.5", "nan", "inf", "soon"])
def test_invalid_watch_interval_is_refused(directory, value, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["report", str(directory), "--watch", value])
    assert stopped.value.code == 2
    assert "--watch" in capsys.readouterr().err


def test_page_of_several_runs_is_in_the_working_directory(few, tmp_path, monkeypatch):
    paths = [few, shutil.copytree(few, tmp_path / "b")]
    monkeypatch.chdir(tmp_path)
    assert main(["report", *map(str, paths)]) == 0
    assert "2 runs compared" in Path("report.html").read_text()
    assert not list(tmp_path.rglob(".report.html*"))


def test_help_lists_the_options():
    command = [sys.executable, "-m", "seqkd", "report", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--watch SECONDS" in done.stdout


# Output of a run


def test_environment_is_recorded(tmp_path):
    config = configuration("x", runs_dir=str(tmp_path))
    directory = run_directory.locate(config)
    with run_directory.lock(directory):
        run_directory.initialize(directory, config, {}, None)
    content = json.loads((directory / "environment.json").read_text())
    assert content["packages"]["torch"] == version("torch")
    assert content["packages"]["ray"] == version("ray")
    assert content["started"].endswith("+00:00") and content["cpus"] >= 1 and content["gpus"] == []
    # A page written before the first step does not make the directory a used one.
    report.write([directory], directory / "report.html")
    assert not run_directory.resumption(directory, config, resume=False).exists


def test_last_lines_of_a_run_list_the_page(tmp_path):
    assert f"report:      {tmp_path / 'report.html'}\n" in closing(tmp_path, {}, 1.0)
    assert "adapter" not in closing(tmp_path, {}, 1.0).replace(str(tmp_path), "")
    (tmp_path / "student_adapter").mkdir()
    assert f"adapter:     {tmp_path / 'student_adapter'}\n" in closing(tmp_path, {}, 1.0)


@pytest.fixture
def train_without_actors(tmp_path, monkeypatch):
    """``seqkd train`` with stubbed steps: ``finish(directory)`` writes and returns the held-out
    measurements."""
    from actors import build
    from seqkd.cli import dry_run, train
    from seqkd.report import model_card
    from seqkd.training import setup

    checked = SimpleNamespace(warnings=(), train=(), heldout=(), corpus=())

    def run(finish, **changes):
        def learn(directory, config, checked, caches, recorder):
            rows = [{"step": i, "phase": "main", "loss": 1.5} for i in range(WARMUP + MAIN)]
            (directory / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
            return finish(directory)

        monkeypatch.setattr(setup, "check", lambda config, resumed: (config, {}, checked))
        monkeypatch.setattr(setup, "identify_models", lambda config: {})
        monkeypatch.setattr(dry_run, "memory_warnings", lambda config, checked: [])
        monkeypatch.setattr(train, "learn", learn)
        monkeypatch.setattr(build, "connect", lambda config, verbose: nullcontext())
        monkeypatch.setattr(build, "check_resources", lambda config: None)
        monkeypatch.setattr(model_card, "write", lambda *arguments: None)  # there is no student
        return train.train(configuration("x", runs_dir=str(tmp_path), **changes), verbose=True)

    return run


@pytest.mark.parametrize("in_its_way", [False, True])
def test_run_writes_its_page_and_survives_a_failure_to_write_it(
    tmp_path, train_without_actors, capsys, in_its_way
):
    """If the page cannot be written, training still succeeds."""

    def finish(directory):
        if in_its_way:
            (directory / "report.html").mkdir()
        return {}

    result = train_without_actors(finish, evaluation={"prompts": 0})
    (out, errors), page = capsys.readouterr(), tmp_path / "x" / "report.html"
    assert result.report == (None if in_its_way else page)
    assert (result.steps, result.figures, result.warnings) == (WARMUP + MAIN, {}, [])
    assert f"report:      {page}" in out
    assert page.is_dir() if in_its_way else "finished" in page.read_text()
    assert ("report.html: cannot be written" in errors) == in_its_way


def test_result_of_a_run_has_the_warning_that_is_printed(train_without_actors, capsys):
    def finish(directory):
        file = directory / "evaluation.json"
        file.write_text(json.dumps(evaluation(np.random.default_rng(0))))
        warn(file, main=WARNING)
        return {"main": "measured"}

    result = train_without_actors(finish)
    assert result.warnings == [WARNING]
    out = capsys.readouterr().out
    assert out.index("paired over prompts") < out.index(f"warning: {WARNING}\n")
