"""The metric catalog is what documentation, reports and tables show."""

from __future__ import annotations

import re
from typing import get_args

import pytest

from seqkd.evaluation import heldout, table
from seqkd.evaluation.catalog import CATALOG, Better, labeled, metric, title
from seqkd.report import plots
from tests.conftest import ROOT

DIRECTIONS = {"": "", "lower": "lower", "higher": "higher", "teacher": "the teacher's"}


def documented():
    """Label, unit and direction by name, from the tables of docs/metrics.md."""
    text = (ROOT / "docs" / "metrics.md").read_text().partition("## Trackers")[0]
    rows = re.findall(r"^\| `([\w/]+)` \|(.*)\|$", text, re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows}


def test_the_documentation_has_the_entries_of_the_catalog():
    documentation = documented()
    assert len(documentation) > 55
    for name, (label, unit, better, definition, _) in documentation.items():
        entry = metric(name)
        assert name.rpartition("/")[2] in CATALOG, name
        assert (label, unit, better) == (entry.label, entry.unit, DIRECTIONS[entry.better]), name
        assert definition, name


def test_every_entry_is_documented_or_a_figure_of_an_evaluation():
    named = {name.rpartition("/")[2] for name in documented()} | set(table.FIGURES)
    assert named == set(CATALOG)
    assert {*heldout.FIGURES, *heldout.TEACHER_FIGURES.values()} <= set(CATALOG)


def test_every_plotted_metric_has_an_entry():
    names = [name for group in plots.SECTIONS.values() for name in group]
    assert len(names) == len(set(names)) and set(names) <= set(CATALOG)
    assert set(plots.HELD_OUT) <= set(names)
    assert set(plots.HELD_OUT.values()) <= set(heldout.FIGURES)


@pytest.mark.parametrize("name", list(CATALOG))
def test_an_entry_is_a_label_with_a_direction(name):
    label, _, better = CATALOG[name]
    assert label and label == label.strip()
    assert better in get_args(Better)
    assert title(name)[0].isupper() and title(name)[1:] == label[1:]


def test_labels_with_and_without_units_and_prefixes():
    assert labeled("dataset/length") == labeled("length") == "completion length (tokens)"
    assert labeled("lr") == "learning rate"
    assert (title("heldout/reverse_kl_per_token"), metric("unheard_of").label) == (
        "Reverse KL per token", "unheard_of",
    )  # fmt: skip
