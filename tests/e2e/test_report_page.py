"""The page in a real browser, on a laptop and on a phone, in light and in dark."""

from __future__ import annotations

import os
import shutil

import pytest
from playwright.sync_api import sync_playwright

from seqkd import report
from tests.report_runs import write_run

NAMES = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, NAMES)), None)
    assert found, (
        "no browser: none of " + ", ".join(NAMES) + " is on the PATH. Run `make browser`, or "
        "install Chromium (Debian, Ubuntu: apt-get install chromium)."
    )
    as_root = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=found, args=as_root)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The page of one run and that of three, by name."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [
        write_run(folder, name, draw, 0.2 * draw) for draw, name in enumerate(("one", "two", "3"))
    ]
    report.write(runs[:1], folder / "one.html")
    report.write(runs, folder / "three.html")
    return {"one": folder / "one.html", "three": folder / "three.html"}


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
    """Opens a page by name; what it asked for and what went wrong must stay as expected."""
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


@pytest.mark.parametrize("name", ["one", "three"])
def test_it_is_whole_and_fits(opened, name, size):
    page = opened(name)
    assert page.title() == {"one": "one · seqkd", "three": "3 runs compared · seqkd"}[name]
    for details in page.locator("details").all():
        details.evaluate("e => e.open = true")
    width = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert width[0] <= width[1] == size["width"]
    paths = page.evaluate(VISIBLE_PATHS)
    assert len(paths) == {"one": 29, "three": 28}[name] and min(paths) >= 3
    for box in (plot.bounding_box() for plot in page.locator("svg.plot").all()):
        assert 300 <= box["width"] <= 480 and box["x"] >= 0
        assert box["x"] + box["width"] <= size["width"]


def test_it_is_light_or_dark(opened, scheme):
    page = opened("one")
    paper = page.locator("body").evaluate(BACKGROUND)
    ink = page.locator("svg.plot text").first.evaluate("e => getComputedStyle(e).fill")
    bright = [sum(map(int, colour[4:-1].split(","))) > 3 * 128 for colour in (paper, ink)]
    assert bright == ([True, False] if scheme == "light" else [False, True])


def test_tokens_are_coloured_by_their_divergence(opened):
    page = opened("one")
    scale = page.locator(".scale .token")
    colours = [scale.nth(i).evaluate(BACKGROUND) for i in range(6)]
    assert colours[0] == CLEAR and len(set(colours)) == 6
    tokens = page.locator(".completion .token[title$=nats]").evaluate_all(SHOWN)
    assert len(tokens) > 30
    for title, colour, line in tokens:
        level = sum(float(title.split()[0]) >= bound for bound in (0.1, 0.5, 1, 2, 4))
        assert colour == colours[level]
        assert line == ("underline" if level > 3 else "none")


def test_a_wide_table_scrolls_in_its_own_box(opened, size):
    page = opened("three")
    box = page.locator("#held-out .scroll").first
    inner, outer = box.evaluate("e => [e.scrollWidth, e.clientWidth]")
    assert inner > outer if size["width"] < 500 else inner >= outer
    box.evaluate("e => e.scrollLeft = 200")
    assert box.evaluate("e => e.scrollLeft") == min(200, inner - outer)
    assert page.evaluate("window.scrollX") == 0


def test_hostile_text_is_text(opened):
    page = opened("one")
    assert page.locator("article script, article img").count() == 0
    assert "<script>document.title" in page.locator("article").nth(1).inner_text()
