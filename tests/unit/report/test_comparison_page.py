"""The page of a comparison: that it shows the tables' numbers, what is missing, and who is who."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from seqkd.cli.compare import update
from seqkd.comparison import plan, results
from seqkd.config.lifecycle import BudgetConfig
from seqkd.errors import StorageError
from seqkd.report import comparison_page as page
from seqkd.report import comparison_plots, plots
from seqkd.storage.run_reader import read
from tests import pages
from tests.comparison_runs import AMOUNT, METHODS, write_comparison, write_evaluation
from tests.report_runs import HOSTILE, write_run

MISSING = (("sft", 2), ("default", 0), ("default", 1), ("default", 2))


def made(parent, *arguments, **options):
    """The result and its page."""
    result = results.read(*write_comparison(parent, *arguments, **options))
    return result, page.render(result, parent / "runs" / "study")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Everything finished, and evaluated on prompts of a directory with a hostile name."""
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
    """One method without any run, the baseline without one of its seeds."""
    return made(tmp_path_factory.mktemp("partly"), missing=MISSING)


class Tables(HTMLParser):
    """[table][row][cell] texts, and which cells hold a mark that does not need colour."""

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
    """By the text of the row's head, the other cells, of the first table of this figure."""
    part = text[re.search(rf"<h3>{title}\b", text).start() :]
    return {head: cells for head, *cells in Tables(part).tables[0][1:]}


# Which differences are real.


def test_a_mean_is_that_of_the_files(whole):
    """Computed from the files alone: the mean over seeds of the quotient of two sums."""
    result, text = whole
    of_seeds = []
    for seed in (0, 1, 2):
        file = result.runs["rao_blackwell", seed].directory / "evaluation.json"
        found = json.loads(file.read_text())["per_prompt"]["main"]["reverse_kl_per_token"]
        of_seeds.append(sum(found["above"]) / sum(found["below"]))
    cells = figure_table(text, "Reverse KL per token")["3. rao_blackwell"]
    assert cells[0].startswith(f"{sum(of_seeds) / 3:.3g} [")
    assert cells[1] == " ".join(f"{value:.3g}" for value in of_seeds)


@pytest.mark.parametrize(
    ("title", "key"),
    [
        ("Reverse KL per token", "reverse_kl_per_token"),
        ("Forward KL per token", "forward_kl_per_token"),
        ("Completion length", "student_length"),
        ("Ended by itself", "student_eos_rate"),
    ],
)
def test_every_number_of_a_first_figure_is_that_of_the_tables(whole, title, key):
    result, text = whole
    of, shown = result.tables[0], figure_table(text, title)
    methods = [f"{i}. {m}" for i, m in enumerate(METHODS, 1)]
    assert list(shown) == [*methods, "the teacher", "before training"]
    apart = {"the teacher": results.TEACHER, "before training": results.INITIAL}
    for head, (mean, seeds, difference) in shown.items():
        method = apart.get(head) or head.split(" ")[1]
        found = of.figures[method].get(key)
        if found is None:  # the teacher from itself
            assert method == results.TEACHER and "kl" in key and not seeds + difference
            continue
        assert mean == f"{found.mean:.3g} [{found.low:.3g}, {found.high:.3g}]"
        assert seeds == " ".join(f"{value:.3g}" for value in found.of_seeds)
        if method == "sft":
            assert difference == "the baseline"
            continue
        from_baseline = of.differences[method][key]
        numbers = " [".join((f"{from_baseline.mean:+.3g}", f"{from_baseline.low:+.3g}"))
        numbers += f", {from_baseline.high:+.3g}]"
        assert difference.startswith(numbers.replace("-", "−"))
        assert difference.endswith(of.verdict(method, key))


def test_a_difference_is_marked_by_more_than_colour(whole):
    result, text = whole
    of, found = result.tables[0], Tables(text)
    overview = found.tables[0]
    marked = 0
    for row, (head, *cells) in enumerate(overview[1:5], 1):
        method = head.split(" ")[1]
        for key, cell in zip(results.FIRST, cells, strict=True):
            if method == "sft":
                continue
            verdict = of.verdict(method, key)
            real = verdict.split()[0] in ("lower", "higher")
            assert cell.endswith(verdict)
            assert ("↓ lower" in cell or "↑ higher" in cell) == real
            assert ("↓" in cell or "↑" in cell) == real
            marked += real
        assert ((0, row) in found.strong) == ("↓" in "".join(cells) or "↑" in "".join(cells))
    assert 4 <= marked < 12


def test_what_is_real_is_said_in_words(whole):
    result, text = whole
    of, lines = result.tables[0], []
    for figure in of.labels:
        verdicts = {m: of.verdict(m, figure) for m in list(METHODS)[1:]}
        for word, head in (
            ("lower", "Lower than"), ("higher", "Higher than"), ("not", "Not told apart from"),
        ):  # fmt: skip
            names = [f"{i}. {m}" for i, m in enumerate(METHODS, 1)
                     if verdicts.get(m, "").startswith(word)]  # fmt: skip
            lines += [f"{head} 1. sft: {', '.join(names)}."] if names else []
    part = text[: text.index('<section id="figures-2">')]
    said = re.findall(r'<p class="said">(.*?)</p>', part.replace("\xa0", " "))
    assert sorted(said) == sorted(lines)
    assert len({line.split()[0] for line in lines}) == 3


def test_every_set_of_prompts_has_its_section(whole):
    result, text = whole
    assert [of.name for of in result.tables][1:] == ['x"><b>$1']
    assert "x&#34;&gt;&lt;b&gt;$1" in text and "<b>" not in text
    part = text[text.index('<section id="figures-2">') :]
    assert Tables(part).tables[0][0] == ["Method", "ROUGE-L 0 to 100", "Length tokens"]
    rouge = figure_table(part, "ROUGE-L")
    assert rouge["4. default"][1] == "23 23.1 23.2" and rouge["the teacher"][1].startswith("31 31")
    assert rouge["4. default"][2].startswith("+3 [+3, +3] ↑ higher")
    assert figure_table(part, "Length")["the teacher"][0] == "not measured"
    assert 'id="forest-1-rougeL-title"' in part


def test_lengths_and_ends_stand_beside_the_divergences(whole):
    _, text = whole
    heads = Tables(text).tables[0][0]
    assert [re.sub(" (nats|tokens)$", "", head) for head in heads[1:]] == [
        "Reverse KL per token", "Forward KL per token", "Completion length", "Ended by itself",
    ]  # fmt: skip
    assert "a divergence alone does not tell a good student" in text


# What it cost.


def test_costs_are_those_of_the_rows(whole):
    result, text = whole
    table = next(t for t in Tables(text).tables if "steps" in t[0] and "prompts" in t[0])
    assert table[0][4] == "learner tokens the budget"
    rows = [result.runs["sft", seed].rows for seed in (0, 1, 2)]
    for column, key in ((2, "prompts"), (3, "sampled_tokens"), (4, "learner_tokens")):
        mean = sum(row[key] for of in rows for row in of) / 3
        assert table[1][column].replace(" ", "") == f"{mean:.0f}"
    assert int(table[1][4].replace(" ", "")) >= AMOUNT
    assert re.fullmatch(r"\d+ min \d+ s", table[1][6])


@pytest.mark.parametrize(
    ("kind", "amount", "said"),
    [
        ("learner_tokens", 25000, "25\u202f000 completion tokens learnt from"),
        ("teacher_tokens", 9, "9 tokens that the teacher wrote or scored"),
        ("seconds", 5400, "1 h 30 min of training steps"),
    ],
)
def test_a_budget_in_words(kind, amount, said):
    assert page.budget(BudgetConfig(kind=kind, amount=amount)) == said


def measured_run(parent, name, seconds, taken, values):
    """A run of steps that took so many seconds each, with a figure at three measurements."""
    directory = write_run(parent, name, warmup=None, steps=taken[-1])
    rows = [{"step": i, "phase": "main", "time_step_s": seconds} for i in range(taken[-1])]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stages = ["initial", *(f"step {step}" for step in taken[1:-1]), "main"]
    figures = {
        stage: {"student_length": {"mean": value, "low": value, "high": value}}
        for stage, value in zip(stages, values, strict=True)
    }
    given = {"prompts": 2, "figures": dict(reversed(figures.items()))}
    (directory / "evaluation.json").write_text(json.dumps(given))
    return read(directory)


def test_a_point_is_the_mean_of_the_seeds_in_what_they_cost_and_in_what_they_reach(tmp_path):
    """By hand: steps of one and of two minutes, four and five of them, both measured after two; the
    second is measured after four as well, which the first is not."""
    first = measured_run(tmp_path, "a", 60.0, [0, 2, 4], [40.0, 30.0, 20.0])
    second = measured_run(tmp_path, "b", 120.0, [0, 2, 4, 5], [44.0, 32.0, 28.0, 26.0])
    path = comparison_plots.path([first, second], "student_length", "seconds")
    assert path.x.tolist() == [0, (2 + 4) / 2, (4 + 10) / 2]
    assert path.y.tolist() == [42, 31, 23]
    assert path.seeds[1].tolist() == [[0, 4, 8, 10], [44, 32, 28, 26]]
    steps = comparison_plots.path([first, second], "student_length", "steps")
    assert steps.x.tolist() == [0, 2, 4.5]
    assert comparison_plots.path([first], "reverse_kl_per_token", "steps") is None


def test_the_budget_is_the_first_axis_and_all_others_follow(whole):
    _, text = whole
    part = text[text.index('<section id="quality">') :]
    assert [name for level, name in pages.Page(part).headings if name.startswith("Against")] == [
        "Against completion tokens learnt from the budget", "Against optimizer steps taken",
        "Against completion tokens sampled", "Against tokens that the teacher wrote or scored",
        "Against minutes of training steps",
    ]  # fmt: skip
    for figure in results.FIRST:
        for axis in ("steps", "learner-tokens", "sampled-tokens", "teacher-tokens", "seconds"):
            assert f'id="{figure.replace("_", "-")}-{axis}-title"' in part


@pytest.mark.parametrize(
    ("heights", "top", "placed"),
    [
        ([10.0, 50.0], 100, [10.0, 50.0]),
        ([10.0, 12.0, 13.0, 80.0], 100, [10.0, 20.0, 30.0, 80.0]),
        ([10.0, 88.0, 90.0, 95.0], 100, [10.0, 80.0, 90.0, 100.0]),
        ([], 100, []),
    ],
)
def test_numbers_at_the_ends_of_lines_stand_apart(heights, top, placed):
    assert plots.apart(heights, 10, top) == placed


# What is missing.


def test_a_run_that_is_missing_is_named_and_the_rest_is_shown(partly):
    result, text = partly
    notes = text[text.index('<section class="notes"') : text.index('<section id="figures-1">')]
    assert "8 of 12 runs are over" in notes
    for method, seed in MISSING:
        assert f"{method}, seed {seed}: not begun." in notes
    assert notes.count("not begun") == len(MISSING)
    shown = figure_table(text, "Reverse KL per token")
    assert shown["4. default"] == ["no run is over", "", ""]
    assert shown["1. sft"][1].endswith("2 of 3 seeds")
    known = result.tables[0].differences["rao_blackwell"]["reverse_kl_per_token"]
    assert len(known.of_seeds) == 2 and f"{known.mean:+.3g}".replace("-", "−") in text
    assert (
        "default, seed 0" not in text[text.index('<section id="samples">') :].partition("</sec")[0]
    )


def test_one_seed_says_so_and_marks_nothing(tmp_path):
    _, text = made(tmp_path, seeds=(3,))
    assert "There is one seed: intervals are over prompts alone" in text
    assert figure_table(text, "Forward KL per token")["3. rao_blackwell"][2].endswith(
        "one seed: not tested"
    )
    assert not any("↓" in cell or "↑" in cell for t in Tables(text).tables for r in t for cell in r)


def test_without_the_baseline_nothing_is_compared(tmp_path):
    _, text = made(tmp_path, missing=[("sft", seed) for seed in (0, 1, 2)])
    assert "No run of the baseline, sft, is over yet: there is nothing to compare with." in text
    assert figure_table(text, "Reverse KL per token")["2. token_forward_kl"][2] == (
        "no seed in common yet"
    )


def test_before_any_run_there_is_a_page(tmp_path):
    missing = [(method, seed) for method in METHODS for seed in (0, 1, 2)]
    _, text = made(tmp_path, missing=missing)
    assert "No run is over yet: figures come with the first." in text
    assert "0 of 12 runs are over" in text
    assert pages.check_plots(text) == 0
    pages.check_headings(text)


def test_a_run_under_way_is_named_with_its_state(tmp_path):
    comparison, entries = write_comparison(tmp_path)
    directory = next(e.directory for e in entries if (e.method, e.seed) == ("default", 1))
    (directory / "evaluation.json").unlink()
    lines = (directory / "metrics.jsonl").read_text().splitlines(keepends=True)
    (directory / "metrics.jsonl").write_text("".join(lines[:7]))
    text = page.render(results.read(comparison, entries), tmp_path / "runs" / "study")
    assert "default, seed 1: stopped." in text and "stopped, 7 steps" in text


# Who is who, and what the page is made of.


def test_more_methods_than_colours_stay_apart(tmp_path):
    methods = {f"method-{i}-with-a-long-name-{i}": [f"learner.lr={i}e-5"] for i in range(1, 14)}
    result, text = made(tmp_path, methods, seeds=(0, 1))
    looks = {(m.colour, m.line) for m in page.methods(result)}
    assert len(looks) == 13
    (plot,) = re.findall(
        r'<svg[^>]*aria-labelledby="reverse-kl-per-token-steps-title.*?</svg>', text, re.DOTALL
    )
    for number in range(1, 14):
        assert f">{number}</text>" in plot
    # Solid, dashed and dotted; the thin lines of seeds have shorter dashes than the thick ones.
    assert len(set(re.findall(r"stroke-dasharray: ([\d., ]+)", plot))) == 2 * 2
    (forest,) = re.findall(
        r'<svg[^>]*aria-labelledby="forest-0-reverse-kl-per-token-title.*?</svg>', text, re.DOTALL
    )
    named = re.findall(r">(\d+ [^<]*…[^<]*)</text>", forest)
    assert len(set(named)) == 13 and all(len(of) <= 23 for of in named)


def test_links_lead_to_the_pages_of_the_runs(tmp_path):
    comparison, entries = write_comparison(tmp_path)
    (entries[0].directory / "report.html").unlink()
    text = page.render(results.read(comparison, entries), tmp_path / "runs" / "study")
    found = {link for link in pages.links(text) if not link.startswith("#")}
    assert found == {f"{e.method}-{e.seed}/report.html" for e in entries[1:]}
    for link in found:
        assert (tmp_path / "runs" / "study" / link).exists()


def test_options_of_one_kind_that_differ_are_told_beside_another_kind(whole):
    _, text = whole
    table = next(t for t in Tables(text).tables if t[0][0] == "Key")
    rows = {key: values for key, *values in table[1:]}
    assert rows["objective.normalization"] == ["–", "–", "rate", "minillm"]
    assert "seed" not in rows and "name" not in rows and "budget.amount" not in rows


def test_nothing_in_it_runs_or_is_fetched(whole, tmp_path):
    pages.check_that_nothing_runs_or_is_fetched(whole[1])
    assert HOSTILE not in whole[1] and "&lt;script&gt;document.title" in whole[1]
    methods = {"a": [f"data.system='{HOSTILE.replace(chr(34), '')}'"], "b": []}
    _, text = made(tmp_path, methods, seeds=(0,))
    assert "<script>" not in text and "data.system=&#39;&lt;script&gt;" in text
    pages.check_that_nothing_runs_or_is_fetched(text)


@pytest.mark.parametrize("which", ["whole", "partly"])
def test_it_can_be_read_by_everyone(which, request):
    _, text = request.getfixturevalue(which)
    # Forests of seven figures (and of two that were evaluated); four figures on five axes.
    assert pages.check_plots(text) == {"whole": 7 + 2, "partly": 7}[which] + 4 * 5
    pages.check_colours(text)
    sections = [name for level, name in pages.check_headings(text) if level == 2]
    assert [name for name in sections if not name.startswith("x")] == [
        "Which differences are real", "What it cost", "Quality against cost",
        "Samples side by side", "Runs, configuration and environment",
    ]  # fmt: skip


def test_samples_are_named_by_method(whole):
    _, text = whole
    part = text[text.index('<section id="samples">') :]
    assert [name for level, name in pages.Page(part).headings if level == 4][:5] == [
        "teacher", *(f"{i}. {method}, seed 0" for i, method in enumerate(METHODS, 1)),
    ]  # fmt: skip


# Writing it.


def test_the_script_writes_it_beside_the_tables(tmp_path):
    comparison, entries = write_comparison(tmp_path, seeds=(0, 1), missing=[("default", 1)])
    update(comparison, entries)
    where = plan.directory(entries)
    assert where == tmp_path / "runs" / "study"
    assert "default, seed 1: not begun." in (where / "report.html").read_text()
    assert (where / "comparison.json").exists() and not list(where.glob(".report*"))


def test_a_page_that_cannot_be_written(tmp_path):
    result = results.read(*write_comparison(tmp_path, seeds=(0,)))
    with pytest.raises(StorageError, match=r"no/page\.html: cannot be written"):
        page.write(result, tmp_path / "no" / "page.html")
