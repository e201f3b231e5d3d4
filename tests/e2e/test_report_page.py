"""Report pages in a real browser: laptop and phone, light and dark."""

from __future__ import annotations

import os
import re
import shutil

import pytest
from playwright.sync_api import sync_playwright

from seqkd import report
from seqkd.comparison import results
from seqkd.report import comparison_page, page, run_page
from tests.comparison_runs import METHODS, write_comparison
from tests.hostile import TEXTS, hostile_runs
from tests.report_runs import write_run

NAMES = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser():
    executable = next(filter(None, map(shutil.which, NAMES)), None)
    assert executable, (
        "no browser found: none of " + ", ".join(NAMES) + " is on the PATH. Run `make browser`, "
        "or install Chromium (Debian, Ubuntu: apt-get install chromium)."
    )
    as_root = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=executable, args=as_root)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Pages by name: of one run, of three runs, of runs with hostile texts, of a complete
    comparison with more methods than colors, and of a comparison with missing runs."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [
        write_run(folder, name, draw, 0.2 * draw) for draw, name in enumerate(("one", "two", "3"))
    ]
    report.write(runs[:1], folder / "one.html")
    report.write(runs, folder / "three.html")
    page.save(run_page.render(hostile_runs(folder, TEXTS), None), folder / "hostile.html")
    files = {name: folder / f"{name}.html" for name in ("one", "three", "hostile")}
    many = METHODS | {f"rkl_discount_{i}": [f"objective.discount=0.{i}"] for i in range(1, 5)}
    absent = [("default", seed) for seed in (0, 1, 2)] + [("sft", 2)]
    for name, methods, missing in (("whole", many, ()), ("partly", METHODS, absent)):
        (folder / name).mkdir()
        result = results.read(*write_comparison(folder / name, methods, missing=missing))
        files[name] = folder / name / "runs" / "study" / "report.html"
        comparison_page.write(result, files[name])
    return files


VISIBLE_PATHS = """() => [...document.querySelectorAll('svg.plot')].map(plot =>
    [...plot.querySelectorAll('path')].filter(path => {
        const box = path.getBBox(), stroke = getComputedStyle(path).stroke;
        return box.width + box.height > 0 && (stroke.startsWith('rgb') || path.closest('defs'));
    }).length)"""
BACKGROUND = "e => getComputedStyle(e).backgroundColor"
SHOWN = """tokens => tokens.map(token => {
    const style = getComputedStyle(token);
    return [token.title, style.backgroundColor, style.textDecorationLine];
})"""
CLEAR = "rgba(0, 0, 0, 0)"


@pytest.fixture(params=[(1280, 800), (390, 844)], ids=["laptop", "phone"])
def size(request):
    return dict(zip(("width", "height"), request.param, strict=True))


@pytest.fixture(params=["light", "dark"])
def scheme(request):
    return request.param


@pytest.fixture
def opened(browser, pages, size, scheme):
    """Function that opens a page by name. After the test, its requests and errors are checked."""
    context = browser.new_context(viewport=size, color_scheme=scheme)
    page = context.new_page()
    requests, wrong = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: wrong.append(dialog.message))

    def open_page(name):
        page.goto(pages[name].as_uri())
        page.wait_for_load_state("networkidle")
        return page

    yield open_page
    asked = [url for url in requests if not url.startswith("data:")]
    assert len(asked) == 1 and asked[0].startswith("file:"), asked
    assert not wrong
    context.close()


TITLES = {"one": "one", "three": "3 runs compared", "whole": "study", "partly": "study"}
PLOTS = {"one": 22 + 4 + 1, "three": 22 + 4 + 3, "whole": 4 * 5, "partly": 4 * 5}
"""Number of plots. Runs: metrics, divergences by cost, and stages. Comparisons: four figures on
five axes."""


@pytest.mark.parametrize("name", list(TITLES))
def test_the_page_is_complete_and_fits(opened, name, size):
    page = opened(name)
    assert page.title() == f"{TITLES[name]} · seqkd"
    for details in page.locator("details").all():
        details.evaluate("e => e.open = true")
    width = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert width[0] <= width[1] == size["width"]
    paths = page.evaluate(VISIBLE_PATHS)
    assert len(paths) == PLOTS[name] and min(paths) >= 3
    for box in (plot.bounding_box() for plot in page.locator("svg.plot").all()):
        assert 300 <= box["width"] <= 480 and box["x"] >= 0
        assert box["x"] + box["width"] <= size["width"]


def test_the_page_follows_the_color_scheme(opened, scheme):
    page = opened("one")
    paper = page.locator("body").evaluate(BACKGROUND)
    ink = page.locator("svg.plot text").first.evaluate("e => getComputedStyle(e).fill")
    bright = [sum(map(int, color[4:-1].split(","))) > 3 * 128 for color in (paper, ink)]
    assert bright == ([True, False] if scheme == "light" else [False, True])


def test_tokens_are_colored_by_their_divergence(opened):
    page = opened("one")
    scale = page.locator(".scale .token")
    colors = [scale.nth(i).evaluate(BACKGROUND) for i in range(6)]
    assert colors[0] == CLEAR and len(set(colors)) == 6
    tokens = page.locator(".completion .token[title$=nats]").evaluate_all(SHOWN)
    assert len(tokens) > 30
    for title, color, line in tokens:
        level = sum(float(title.split()[0]) >= bound for bound in (0.1, 0.5, 1, 2, 4))
        assert color == colors[level]
        assert line == ("underline" if level > 3 else "none")


def test_a_wide_table_scrolls_in_its_own_box(opened, size):
    page = opened("three")
    box = page.locator("#held-out .scroll").first
    inner, outer = box.evaluate("e => [e.scrollWidth, e.clientWidth]")
    assert inner > outer if size["width"] < 500 else inner >= outer
    box.evaluate("e => e.scrollLeft = 200")
    assert box.evaluate("e => e.scrollLeft") == min(200, inner - outer)
    assert page.evaluate("window.scrollX") == 0


def test_markup_in_text_is_escaped(opened):
    page = opened("hostile")
    assert page.title() == "4 runs compared · seqkd"
    assert page.locator("script, img, svg svg, h1 ~ h1, [onmouseover], [onload]").count() == 0
    names = page.locator("header .entries strong").all_inner_texts()
    assert names[0].startswith(f"1. {TEXTS['script']}") and len(names) == 4


MARKS = """row => {
    const cell = row.querySelector('.forest').getBoundingClientRect();
    const box = name => row.querySelector(name).getBoundingClientRect();
    const dot = box('.dot'), bar = box('.bar'), rule = box('.rule');
    return {
        dot: (dot.left + dot.width / 2 - cell.left) / cell.width,
        low: (bar.left - cell.left) / cell.width,
        high: (bar.right - cell.left) / cell.width,
        inside: dot.top >= cell.top && dot.bottom <= cell.bottom,
        whole: Math.abs(rule.height - cell.height) < 3,
    };
}"""


@pytest.mark.parametrize("name", ["whole", "partly"])
def test_intervals_are_drawn_in_the_row_of_their_method(opened, name):
    """All rows share one axis, and marks are in proportion to the numbers."""
    page = opened(name)
    rows = page.locator("#figures-1 h3 + .scroll").first.locator("tbody tr:has(.dot)").all()
    assert len(rows) == {"whole": 8, "partly": 3}[name]
    drawn, shown = [], []
    for row in rows:
        drawn.append(row.evaluate(MARKS))
        numbers = re.findall(r"[\d.]+", row.locator("td").nth(1).inner_text())
        shown.append([float(number) for number in numbers])
    (a, b) = (drawn[0]["dot"], drawn[2]["dot"])
    scale = (b - a) / (shown[2][0] - shown[0][0])
    for marks, (mean, low, high) in zip(drawn, shown, strict=True):
        assert marks["inside"] and marks["whole"]
        for place, value in (("dot", mean), ("low", low), ("high", high)):
            assert marks[place] == pytest.approx(a + scale * (value - shown[0][0]), abs=0.03)


def test_significant_differences_are_visible_without_color(opened):
    page = opened("whole")
    strong = page.locator("#figures-1 table strong").all()
    assert len(strong) > 8
    for mark in strong:
        assert mark.text_content()[0] in "↑↓"
        assert int(mark.evaluate("e => getComputedStyle(e).fontWeight")) >= 600


def test_methods_of_the_same_color_are_distinguishable(opened):
    page = opened("whole")
    swatches = page.locator("header .entries .swatch")
    assert swatches.count() == 8
    first, seventh = (
        swatches.nth(i).evaluate("e => getComputedStyle(e).backgroundImage") for i in (0, 6)
    )
    assert first == "none" and "linear-gradient" in seventh
    assert page.locator("header .entries strong").nth(6).inner_text() == "7. rkl_discount_3"
