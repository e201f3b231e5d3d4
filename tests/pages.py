"""Checks of every report page: it runs and fetches nothing, and it is accessible."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

FORBIDDEN = {"script", "img", "iframe", "object", "embed", "form", "base", "video"}


class Page(HTMLParser):
    """Parsed page: tags with their attributes, and the text of each heading."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.headings, self.open = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if re.fullmatch("h[1-6]", tag):
            self.open = int(tag[1])
            self.headings.append((self.open, ""))

    def handle_endtag(self, tag):
        if re.fullmatch("h[1-6]", tag):
            self.open = None

    def handle_data(self, data):
        if self.open:
            level, text = self.headings[-1]
            self.headings[-1] = (level, text + data)

    def ids(self):
        return [attributes["id"] for _, attributes in self.tags if "id" in attributes]


def links(text):
    """Return the targets of all links."""
    return {attributes["href"] for tag, attributes in Page(text).tags if tag == "a"}


def check_that_nothing_runs_or_is_fetched(text):
    """Check that links are the only references to other files."""
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & FORBIDDEN
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), tag
        for name in {"src", "href", "xlink:href"} & attributes.keys():
            inside = attributes[name].startswith("#") or attributes[name] == "data:,"
            assert inside or tag == "a", attributes
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1]
    assert "url(" not in style and "@import" not in style
    policy = [a for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy[0]["content"].startswith("default-src 'none'")


def check_plots(text):
    """Check that plots are well-formed, have descriptions, and have no fixed colors or foreign ids;
    return their number."""
    plots = re.findall(r'<svg class="plot".*?</svg>', text, re.DOTALL)
    for plot in plots:
        root = ElementTree.fromstring(plot.replace("<svg ", '<svg xmlns:xlink="x" ', 1))
        title, description = root[0], root[1]
        assert title.tag == "title" and title.text
        assert description.tag == "desc" and re.search(r"\d", description.text)
        assert root.get("aria-labelledby") == f"{title.get('id')} {description.get('id')}"
        assert not re.search(r"#[0-9a-f]{6}\b", plot), (
            "a fixed color does not follow light and dark mode"
        )
        inner = [element.get("id") for element in root.iter() if element.get("id")]
        used = re.findall(r'(?:url\(#|href="#)([^)"]+)', plot)
        assert set(used) <= set(inner)
    ids = Page(text).ids()
    assert len(ids) == len(set(ids))
    return len(plots)


def check_colors(text):
    """Check that all colors are defined in the style sheet for light and dark mode."""
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1]
    light, dark = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    used = set(re.findall(r"var\(--([\w-]+)\)", text)) - {"color"}
    for variables in (light, dark):
        assert used <= set(re.findall(r"--([\w-]+):", variables))


def check_headings(text):
    """Check that no heading level is skipped; return the level and text of each heading."""
    headings = Page(text).headings
    levels = [level for level, _ in headings]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    return headings
