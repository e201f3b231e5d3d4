"""Common parts of report pages: templates, tables and differences between configurations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from seqkd.config.run import Config
from seqkd.escaping import printable
from seqkd.evaluation.catalog import labeled, metric, title
from seqkd.evaluation.summary import Evaluation
from seqkd.evaluation.tasks import with_tasks
from seqkd.files import atomic_write, disk_errors
from seqkd.report import samples, wording
from seqkd.report.svg import Key
from seqkd.storage.run_directory import flat


class Table(NamedTuple):
    """Table of a page. The first cell of each row is its heading."""

    label: str
    heads: Sequence[str | Key]
    rows: Sequence[Sequence[Any]]
    """Cells: text, a Key, an interval (anything with mean, low and high), or None for no value."""


def render(template: str, **values: Any) -> str:
    """Return the HTML of a page. Values are escaped, and control characters are shown as codes."""
    environment = Environment(
        loader=PackageLoader("seqkd.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {
        "metric": metric, "title_of": title, "samples": samples, "wording": wording,
    }  # fmt: skip
    return printable(environment.get_template(template).render(written=datetime.now(UTC), **values))


def save(text: str, out: Path) -> None:
    """Write the page atomically. Raises StorageError if it cannot be written."""
    with disk_errors(out):
        atomic_write(out, text)


def figure_table(
    label: str, figures: Mapping[Any, Mapping[str, Any]], names: Sequence[str]
) -> Table:
    """Return a table with a row per figure and a column per stage, model or run."""
    order = with_tasks(names, *figures.values())
    present = [name for name in order if any(name in column for column in figures.values())]
    rows = [[labeled(name), *(column.get(name) for column in figures.values())] for name in present]
    return Table(label, ["Figure", *figures], rows)


def change_table(evaluation: Evaluation, between: Callable[[str], str]) -> Table:
    """Return a table with a row per paired change; ``between`` formats the names of the pair."""
    rows = [
        [labeled(name), between(pair), wording.change(change)]
        for name, pairs in evaluation.changes.items()
        for pair, change in pairs.items()
    ]
    heads = ["Figure", "Between", "Change and 95 % interval"]
    return Table("Changes, paired over prompts", heads, rows)


def differing(configs: Sequence[Config | None], keys: Sequence[Key]) -> Table:
    """Return a table of the settings that differ between configurations.

    These settings are omitted: the name and directory of a run, keys within a section that another
    configuration does not have, and options that exist for one kind only and have only one value.
    """
    settings = [flat(config) if config else {} for config in configs]

    def value(values: Mapping[str, Any], key: str) -> str:
        inside = any(other.startswith(f"{key}.") for other in values)
        return "set" if inside else str(values.get(key, "–"))

    names = dict.fromkeys(k for values in settings for k in values if k not in ("name", "runs_dir"))
    rows = {name: [value(values, name) for values in settings] for name in names}
    rows = {name: cells for name, cells in rows.items() if len(set(cells)) > 1}

    def implied(name: str) -> bool:
        parts = name.split(".")[:-1]
        above = {".".join(parts[: i + 1]) for i in range(len(parts))}
        single_kind = f"{'.'.join(parts)}.kind" in rows and len(set(rows[name]) - {"–"}) == 1
        return bool(above & rows.keys()) or single_kind

    cells = [[name, *row] for name, row in rows.items() if not implied(name)]
    return Table("Differences between the configurations", ["Key", *keys], cells)


def shared(values: Sequence[Any]) -> Any:
    """Return the value if all values are equal, else None."""
    return values[0] if all(value == values[0] for value in values) else None
