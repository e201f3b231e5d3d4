"""The import graph of the project, and its layers: python -m tests.import_graph [DIRECTORY]"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

LAYERS = (
    ("seqkd.types", "seqkd.errors"),
    ("seqkd.files", "seqkd.console"),
    ("seqkd.config",),
    ("seqkd.objectives", "seqkd.data", "seqkd.models", "seqkd.protocols"),
    ("seqkd.learner", "seqkd.workers"),
    ("seqkd.evaluation",),
    ("seqkd.storage",),
    ("seqkd.teachers",),
    ("seqkd.checks", "seqkd.comparison", "seqkd.studies"),
    ("seqkd.training",),
    ("actors", "seqkd.report"),
    ("seqkd.cli",),
    ("scripts",),
)
"""Lowest first. A module imports modules of its own package and of lower layers."""


def room(module: str) -> str:
    """The package of a module, or the module itself where it lies directly below seqkd."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "seqkd" else parts[0]


def layer(module: str) -> int | None:
    """Index of the layer of a module; None for a module that has none."""
    places = (i for i, names in enumerate(LAYERS) if room(module) in names)
    return next(places, None)


def modules(root: Path) -> dict[str, Path]:
    """Every module of the project by its dotted name. Empty package files are omitted."""
    found = {}
    for folder in ("seqkd", "actors", "scripts"):
        for file in sorted((root / folder).rglob("*.py")):
            name = ".".join(file.relative_to(root).with_suffix("").parts)
            if len(ast.parse(file.read_text()).body) > 1:
                found[name.removesuffix(".__init__")] = file
    return found


def _executed(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
            yield child
            yield from _executed(child)


def imports(file: Path, known: set[str]) -> set[str]:
    """Modules of ``known`` that a file imports, in functions too, but not for type checkers."""
    found = set()
    for node in _executed(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else node.module)
    return found & known


def graph(root: Path) -> dict[str, set[str]]:
    """Imports of every module."""
    files = modules(root)
    return {name: imports(file, set(files)) - {name} for name, file in files.items()}


def rooms(edges: dict[str, set[str]]) -> dict[str, set[str]]:
    """The same between packages."""
    found: dict[str, set[str]] = defaultdict(set)
    for module, below in edges.items():
        found[room(module)] |= {room(name) for name in below} - {room(module)}
    return found


def levels(edges: dict[str, set[str]]) -> int | None:
    """Length of the longest chain of imports; None where imports form a cycle."""
    depth: dict[str, int] = {}
    try:
        for name in TopologicalSorter(edges).static_order():
            depth[name] = 1 + max((depth[below] for below in edges.get(name, ())), default=0)
    except CycleError:
        return None
    return max(depth.values())


def upward(edges: dict[str, set[str]]) -> list[str]:
    """Imports of a module in a higher layer, or of another package in the same layer."""
    found = []
    for name, below in sorted(edges.items()):
        for other in sorted(below):
            here, there = layer(name), layer(other)
            if here is None or there is None or room(name) == room(other):
                continue
            if there >= here:
                found.append(f"{name} -> {other}")
    return found


def main() -> None:
    """Print the size of the graph."""
    edges = graph(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1])
    for title, of in (("modules", edges), ("packages", rooms(edges))):
        depth = levels(of)
        print(
            f"{title}: {len(of)}, levels: {depth or 'a cycle'}, edges: {sum(map(len, of.values()))}"
        )
    print("\n".join(["upward edges: " + str(len(upward(edges))), *upward(edges)]))


if __name__ == "__main__":
    main()
