"""The page of a comparison: numbers of the tables, missing runs, labels of methods."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from markupsafe import escape

from seqkd.cli.compare import update
from seqkd.comparison import plan, results
from seqkd.config.lifecycle import BudgetConfig
from seqkd.errors import StorageError
from seqkd.evaluation.catalog import title as title_of
from seqkd.report import comparison_page as page
from seqkd.report import curves
from seqkd.report.svg import Key
from seqkd.storage.run_reader import read
from tests import pages
from tests.comparison_runs import AMOUNT, METHODS, write_comparison, write_evaluation
from tests.report_runs import HOSTILE, write_run

MISSING = (("sft", 2), ("default", 0), ("default", 1), ("default", 2))


def render_page(parent, *arguments, **options):
    """Write a comparison; return its result and its page."""
    result = results.read(*write_comparison(parent, *arguments, **options))
    return result, page.render(result, parent / "runs" / "study")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Result and page with all runs finished and evaluated on prompts with a hostile name."""
    parent = tmp_path_factory.mktemp("whole")
    comparison, entries = write_comparison(parent)
    for entry in entries:
        score = 20.0 + list(METHODS).index(entry.method) + 0.1 * entry.seed
        figures = {"rougeL": np.linspace(score - 5, score + 5, 11), "length": [40.0] * 11}
        models = {"student": figures, "teacher": {"rougeL": [31.0] * 11}}
        write_evaluation(entry.directory, 'x"><b>$1', models)
    result = results.read(comparison, entries)
    return result, page.render(result, parent / "runs" / "study")


@pytest.fixture(scope="module")
def partly(tmp_path_factory):
    """Result and page without any run of one method and without one seed of the baseline."""
    return render_page(tmp_path_factory.mktemp("partly"), missing=MISSING)


class Tables(HTMLParser):
    """Texts by [table][row][cell], and the rows with a mark that does not depend on color."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.inside, self.strong = [], False, set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.inside = True
        elif tag in ("div", "span"):
            self.handle_data(" ")
        elif tag == "strong" and self.inside:
            self.strong.add((len(self.tables) - 1, len(self.tables[-1]) - 1))

    def handle_endtag(self, tag):
        if self.inside and tag in ("td", "th"):
            self.tables[-1][-1][-1] = self.tables[-1][-1][-1].strip()
            self.inside = False

    def handle_data(self, data):
        if self.inside:
            cells = self.tables[-1][-1]
            cells[-1] = re.sub(r"\s+", " ", cells[-1] + data)


def figure_table(text, title):
    """Return the cells of the first table of a figure, by the heading of the row."""
    part = text[re.search(rf"<h3>{title}\b", text).start() :]
    return {head: cells for head, *cells in Tables(part).tables[0][1:]}


# Differences


def test_means_match_the_files(whole):
    """The expected value is computed from the files only: the mean over seeds of a ratio of two
    sums."""
    result, text = whole
    of_seeds = []
    for seed in (0, 1, 2):
        file = result.runs["rao_blackwell", seed].directory / "evaluation.json"
        sums = json.loads(file.read_text())["per_prompt"]["main"]["reverse_kl_per_token"]
        of_seeds.append(sum(sums["above"]) / sum(sums["below"]))
    cells = figure_table(text, "Reverse KL per token")["3. rao_blackwell"]
    assert cells[1].startswith(f"{sum(of_seeds) / 3:.3g} [")
    assert cells[2] == " ".join(f"{value:.3g}" for value in of_seeds)


@pytest.mark.parametrize(
    ("title", "key"),
    [
        ("Reverse KL per token", "reverse_kl_per_token"),
        ("Forward KL per token", "forward_kl_per_token"),
        ("Completion length", "student_length"),
        ("EOS rate", "student_eos_rate"),
    ],
)
def test_numbers_of_the_first_figures_match_the_tables(whole, title, key):
    result, text = whole
    tables, shown = result.tables[0], figure_table(text, title)
    methods = [f"{i}. {m}" for i, m in enumerate(METHODS, 1)]
    assert list(shown) == [*methods, "teacher", "before training"]
    apart = {"teacher": results.TEACHER, "before training": results.INITIAL}
    for head, (_, mean, seeds, difference) in shown.items():
        method = apart.get(head) or head.split(" ")[1]
        estimate = tables.figures[method].get(key)
        if estimate is None:  # divergence of the teacher from itself
            assert method == results.TEACHER and "kl" in key and not seeds + difference
            continue
        assert mean == f"{estimate.mean:.3g} [{estimate.low:.3g}, {estimate.high:.3g}]"
        assert seeds == " ".join(f"{value:.3g}" for value in estimate.of_seeds)
        if method == "sft":
            assert difference == "baseline"
            continue
        from_baseline = tables.differences[method][key]
        numbers = " [".join((f"{from_baseline.mean:+.3g}", f"{from_baseline.low:+.3g}"))
        numbers += f", {from_baseline.high:+.3g}]"
        assert difference.startswith(numbers.replace("-", "−"))
        assert difference.endswith(tables.verdict(method, key))


def test_differences_are_marked_by_more_than_color(whole):
    result, text = whole
    tables, shown = result.tables[0], Tables(text)
    overview = shown.tables[0]
    marked = 0
    for row, (head, *cells) in enumerate(overview[1:5], 1):
        method = head.split(" ")[1]
        for key, cell in zip(results.FIRST, cells, strict=True):
            if method == "sft":
                continue
            verdict = tables.verdict(method, key)
            real = verdict.split()[0] in ("lower", "higher")
            assert cell.endswith(verdict)
            assert ("↓ lower" in cell or "↑ higher" in cell) == real
            assert ("↓" in cell or "↑" in cell) == real
            marked += real
        assert ((0, row) in shown.strong) == ("↓" in "".join(cells) or "↑" in "".join(cells))
    assert 4 <= marked < 12


def test_intervals_have_a_common_axis(whole):
    """The marks of each row are at its numbers, in percent of the width."""
    result, text = whole
    (held_out, *_) = result.tables
    keys = page.methods(result)
    for figure in page.figures(held_out, result, keys):
        shown = {row.head.label: row for row in figure.rows if isinstance(row.head, Key)}
        estimates = [held_out.figures[method][figure.name] for method in METHODS]
        ends = [v for e in estimates for v in (e.low, e.high, *e.of_seeds)]
        if teacher := held_out.figures[results.TEACHER].get(figure.name):
            ends += [teacher.low, teacher.high, *teacher.of_seeds]
        low, high = min(ends), max(ends)
        assert (figure.at(low), figure.at(high)) == (4, 96)
        assert all(low <= tick <= high for tick in figure.ticks)
        part = text[text.index(f'aria-label="{escape(title_of(figure.name))}"') :]
        rows = re.findall(r"<tr>(.*?)</tr>", part.partition("</table>")[0], re.DOTALL)[1:]
        for estimate, (label, row), html in zip(estimates, shown.items(), rows, strict=False):
            assert label in html and f"{estimate.mean:.3g}" in html
            (mean,) = re.findall(r'<i class="dot([^"]*)" style="left:([\d.]+)%">', html)
            assert float(mean[1]) == pytest.approx(
                4 + 92 * (estimate.mean - low) / (high - low), abs=0.01
            )
            ((left, width),) = re.findall(
                r'<i class="bar" style="left:([\d.]+)%;width:([\d.]+)%">', html
            )
            assert float(left) == figure.at(estimate.low)
            assert float(width) == pytest.approx(
                92 * (estimate.high - estimate.low) / (high - low), abs=0.02
            )
            assert html.count('class="seed"') == 3
            assert ("full" in mean[0]) == bool(row.arrow or row.baseline)
            assert ("diamond" in mean[0]) == row.baseline


def test_every_prompt_set_has_a_section(whole):
    result, text = whole
    assert [tables.name for tables in result.tables][1:] == ['x"><b>$1']
    assert "x&#34;&gt;&lt;b&gt;$1" in text and "<b>" not in text
    part = text[text.index('<section id="figures-2">') :]
    assert Tables(part).tables[0][0] == [
        "Method", "ROUGE-L 0 to 100, higher is better",
        "Completion length tokens, should match the teacher",
    ]  # fmt: skip
    rouge = figure_table(part, "ROUGE-L")
    assert rouge["4. default"][2] == "23 23.1 23.2" and rouge["teacher"][2].startswith("31 31")
    assert rouge["4. default"][3].startswith("+3 [+3, +3] ↑ higher")
    assert figure_table(part, "Completion length")["teacher"][1] == "not measured"
    assert 'class="diamond' in part or "full diamond" in part


def test_overview_has_length_and_eos_rate_next_to_divergences(whole):
    _, text = whole
    assert Tables(text).tables[0][0][1:] == [
        "Reverse KL per token nats, lower is better", "Forward KL per token nats, lower is better",
        "Completion length tokens, should match the teacher",
        "EOS rate share, should match the teacher",
    ]  # fmt: skip
    assert "Length is always reported with divergence" in text


# Costs


def test_costs_match_the_rows(whole):
    result, text = whole
    table = next(t for t in Tables(text).tables if "Optimizer steps" in t[0])
    assert table[0] == [
        "Method", "Optimizer steps", "Prompts", "Sampled tokens", "Trained tokens (the budget)",
        "Teacher tokens", "Time in steps",
    ]  # fmt: skip
    rows = [result.runs["sft", seed].rows for seed in (0, 1, 2)]
    for column, key in ((2, "prompts"), (3, "sampled_tokens"), (4, "learner_tokens")):
        mean = sum(row[key] for run_rows in rows for row in run_rows) / 3
        assert table[1][column].replace(" ", "") == f"{mean:.0f}"
    assert int(table[1][4].replace(" ", "")) >= AMOUNT
    assert re.fullmatch(r"\d+ min \d+ s", table[1][6])


@pytest.mark.parametrize(
    ("kind", "amount", "text"),
    [
        ("learner_tokens", 25000, "25\u202f000 trained tokens"),
        ("teacher_tokens", 9, "9 teacher tokens"),
        ("seconds", 5400, "1 h 30 min of training steps"),
    ],
)
def test_budget_as_text(kind, amount, text):
    assert page.budget(BudgetConfig(kind=kind, amount=amount)) == text


def measured_run(parent, name, seconds, taken, values):
    """Write and read a run whose steps take ``seconds`` each, with a figure at the steps
    ``taken``."""
    directory = write_run(parent, name, warmup=None, steps=taken[-1])
    rows = [{"step": i, "phase": "main", "time_step_s": seconds} for i in range(taken[-1])]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stages = ["initial", *(f"step {step}" for step in taken[1:-1]), "main"]
    figures = {
        stage: {"student_length": {"mean": value, "low": value, "high": value}}
        for stage, value in zip(stages, values, strict=True)
    }
    evaluation = {"prompts": 2, "figures": dict(reversed(figures.items()))}
    (directory / "evaluation.json").write_text(json.dumps(evaluation))
    return read(directory)


def test_points_are_means_over_seeds_of_cost_and_figure(tmp_path):
    """By hand: the first run has four steps of one minute, the second five steps of two minutes.
    Both are measured after two steps, and only the second also after four."""
    first = measured_run(tmp_path, "a", 60.0, [0, 2, 4], [40.0, 30.0, 20.0])
    second = measured_run(tmp_path, "b", 120.0, [0, 2, 4, 5], [44.0, 32.0, 28.0, 26.0])
    (x, y), seeds = curves.paths([first, second], "student_length", "seconds")
    assert x.tolist() == [0, (2 + 4) / 2, (4 + 10) / 2]
    assert y.tolist() == [42, 31, 23]
    assert seeds[1].tolist() == [[0, 4, 8, 10], [44, 32, 28, 26]]
    (x, _), _ = curves.paths([first, second], "student_length", "steps")
    assert x.tolist() == [0, 2, 4.5]
    assert curves.paths([first], "reverse_kl_per_token", "steps") is None


def test_first_axis_is_the_kind_of_the_budget(whole):
    _, text = whole
    part = text[text.index('<section id="quality">') :]
    assert re.findall(r"<(?:h3|summary)>(Against [a-z ]+)", part) == [
        "Against trained tokens ", "Against optimizer steps", "Against sampled tokens",
        "Against teacher tokens", "Against minutes of training steps",
    ]  # fmt: skip
    for figure in results.FIRST:
        for axis in ("steps", "learner-tokens", "sampled-tokens", "teacher-tokens", "seconds"):
            assert f'id="{figure.replace("_", "-")}-{axis}-title"' in part


# Missing runs


def test_missing_runs_are_listed(partly):
    result, text = partly
    notes = text[text.index('<section class="notes"') : text.index('<section id="figures-1">')]
    assert "8 of 12 runs are finished" in notes
    for method, seed in MISSING:
        assert f"{method}, seed {seed}: not started." in notes
    assert notes.count("not started") == len(MISSING)
    shown = figure_table(text, "Reverse KL per token")
    assert shown["4. default"][1:] == ["no finished run", "", ""]
    assert shown["1. sft"][2].endswith("2 of 3 seeds")
    change = result.tables[0].differences["rao_blackwell"]["reverse_kl_per_token"]
    assert len(change.of_seeds) == 2 and f"{change.mean:+.3g}".replace("-", "−") in text
    assert (
        "default, seed 0" not in text[text.index('<section id="samples">') :].partition("</sec")[0]
    )


def test_single_seed_is_noted_and_marks_no_differences(tmp_path):
    _, text = render_page(tmp_path, seeds=(3,))
    assert "There is only one seed: intervals are over prompts only" in text
    assert figure_table(text, "Forward KL per token")["3. rao_blackwell"][3].endswith(
        "one seed: not tested"
    )
    assert not any("↓" in cell or "↑" in cell for t in Tables(text).tables for r in t for cell in r)


def test_page_without_a_finished_baseline(tmp_path):
    _, text = render_page(tmp_path, missing=[("sft", seed) for seed in (0, 1, 2)])
    assert "No run of the baseline sft is finished, so there are no differences yet." in text
    assert figure_table(text, "Reverse KL per token")["2. token_forward_kl"][3] == (
        "no common seed yet"
    )


def test_page_before_the_first_run(tmp_path):
    missing = [(method, seed) for method in METHODS for seed in (0, 1, 2)]
    _, text = render_page(tmp_path, missing=missing)
    assert "No run is finished yet." in text
    assert "0 of 12 runs are finished" in text
    assert pages.check_plots(text) == 0
    pages.check_headings(text)


def test_unfinished_run_is_listed_with_its_state(tmp_path):
    comparison, entries = write_comparison(tmp_path)
    directory = next(e.directory for e in entries if (e.method, e.seed) == ("default", 1))
    (directory / "evaluation.json").unlink()
    lines = (directory / "metrics.jsonl").read_text().splitlines(keepends=True)
    (directory / "metrics.jsonl").write_text("".join(lines[:7]))
    text = page.render(results.read(comparison, entries), tmp_path / "runs" / "study")
    assert "default, seed 1: stopped." in text and "stopped, 7 steps" in text


# Labels and structure


def test_more_methods_than_colors_are_distinguishable(tmp_path):
    methods = {f"method-{i}-with-a-long-name-{i}": [f"learner.lr={i}e-5"] for i in range(1, 14)}
    result, text = render_page(tmp_path, methods, seeds=(0, 1))
    looks = {(key.variable, key.dash) for key in page.methods(result).values()}
    assert len(looks) == 13
    (plot,) = re.findall(
        r'<svg[^>]*aria-labelledby="reverse-kl-per-token-steps-title.*?</svg>', text, re.DOTALL
    )
    # Dashed and dotted lines; the thin lines of seeds have shorter dashes than the thick lines.
    assert len(set(re.findall(r"stroke-dasharray: ([\d., ]+)", plot))) == 2 * 2


def test_links_to_the_pages_of_the_runs(tmp_path):
    comparison, entries = write_comparison(tmp_path)
    (entries[0].directory / "report.html").unlink()
    text = page.render(results.read(comparison, entries), tmp_path / "runs" / "study")
    links = {link for link in pages.links(text) if not link.startswith("#")}
    assert links == {f"{e.method}-{e.seed}/report.html" for e in entries[1:]}
    for link in links:
        assert (tmp_path / "runs" / "study" / link).exists()


def test_differing_options_of_one_kind_are_listed(whole):
    _, text = whole
    table = next(t for t in Tables(text).tables if t[0][0] == "Key")
    rows = {key: values for key, *values in table[1:]}
    assert rows["objective.normalization"] == ["–", "–", "rate", "minillm"]
    assert "seed" not in rows and "name" not in rows and "budget.amount" not in rows


def test_page_runs_and_fetches_nothing(whole, tmp_path):
    pages.check_that_nothing_runs_or_is_fetched(whole[1])
    assert HOSTILE not in whole[1] and "&lt;script&gt;document.title" in whole[1]
    methods = {"a": [f"data.system='{HOSTILE.replace(chr(34), '')}'"], "b": []}
    _, text = render_page(tmp_path, methods, seeds=(0,))
    assert "<script>" not in text and "data.system=&#39;&lt;script&gt;" in text
    pages.check_that_nothing_runs_or_is_fetched(text)


@pytest.mark.parametrize("which", ["whole", "partly"])
def test_page_is_accessible(which, request):
    _, text = request.getfixturevalue(which)
    assert pages.check_plots(text) == 4 * 5, "four figures on five axes"
    # Seven held-out figures and two figures of seqkd evaluate.
    assert text.count('class="tick"') >= 2 * {"whole": 9, "partly": 7}[which]
    pages.check_colors(text)
    sections = [name for level, name in pages.check_headings(text) if level == 2]
    assert [name for name in sections if not name.startswith("x")] == [
        "Differences", "Cost", "Quality against cost",
        "Samples side by side", "Runs, configuration and environment",
    ]  # fmt: skip


def test_samples_are_labeled_by_method(whole):
    _, text = whole
    part = text[text.index('<section id="samples">') :]
    assert [name for level, name in pages.Page(part).headings if level == 4][:5] == [
        "teacher", *(f"{i}. {method}, seed 0" for i, method in enumerate(METHODS, 1)),
    ]  # fmt: skip


# Writing


def test_update_writes_the_page_and_the_tables(tmp_path):
    comparison, entries = write_comparison(tmp_path, seeds=(0, 1), missing=[("default", 1)])
    update(comparison, entries)
    where = plan.directory(entries)
    assert where == tmp_path / "runs" / "study"
    assert "default, seed 1: not started." in (where / "report.html").read_text()
    assert (where / "comparison.json").exists() and not list(where.glob(".report*"))


def test_a_page_that_cannot_be_written(tmp_path):
    result = results.read(*write_comparison(tmp_path, seeds=(0,)))
    with pytest.raises(StorageError, match=r"no/page\.html: cannot be written"):
        page.write(result, tmp_path / "no" / "page.html")
