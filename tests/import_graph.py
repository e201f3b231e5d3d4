"""Import graph of the project and its layers: python -m tests.import_graph [DIRECTORY]"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

LAYERS = (
    ("seqkd.types", "seqkd.errors", "seqkd.escaping"),
    ("seqkd.files", "seqkd.console", "seqkd.imports"),
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
"""Layers, lowest first. A module may import modules of its own package and of lower layers."""


def room(module: str) -> str:
    """Return the package of a module, or the module itself if it is directly in seqkd."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "seqkd" else parts[0]


def layer(module: str) -> int | None:
    """Return the index of the layer of a module; None if it has no layer."""
    places = (i for i, names in enumerate(LAYERS) if room(module) in names)
    return next(places, None)


def modules(root: Path) -> dict[str, Path]:
    """Return all modules of the project by dotted name, without empty package files."""
    files = {}
    for folder in ("seqkd", "actors", "scripts"):
        for file in sorted((root / folder).rglob("*.py")):
            name = ".".join(file.relative_to(root).with_suffix("").parts)
            if len(ast.parse(file.read_text()).body) > 1:
                files[name.removesuffix(".__init__")] = file
    return files


def _executed(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
            yield child
            yield from _executed(child)


def imports(file: Path, names: set[str]) -> set[str]:
    """Return the modules of ``names`` that a file imports, including imports in functions and
    excluding imports for type checkers."""
    result = set()
    for node in _executed(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            result |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                result.add(inner if inner in names else node.module)
    return result & names


def graph(root: Path) -> dict[str, set[str]]:
    """Return the imports of every module."""
    files = modules(root)
    return {name: imports(file, set(files)) - {name} for name, file in files.items()}


def rooms(edges: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return the imports between packages."""
    result: dict[str, set[str]] = defaultdict(set)
    for module, below in edges.items():
        result[room(module)] |= {room(name) for name in below} - {room(module)}
    return result


def levels(edges: dict[str, set[str]]) -> int | None:
    """Return the length of the longest chain of imports; None if imports form a cycle."""
    depth: dict[str, int] = {}
    try:
        for name in TopologicalSorter(edges).static_order():
            depth[name] = 1 + max((depth[below] for below in edges.get(name, ())), default=0)
    except CycleError:
        return None
    return max(depth.values())


def upward(edges: dict[str, set[str]]) -> list[str]:
    """Return imports from a higher layer or from another package of the same layer."""
    result = []
    for name, below in sorted(edges.items()):
        for other in sorted(below):
            here, there = layer(name), layer(other)
            if here is None or there is None or room(name) == room(other):
                continue
            if there >= here:
                result.append(f"{name} -> {other}")
    return result


def main() -> None:
    """Print the size of the graph and its upward imports."""
    edges = graph(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1])
    for title, nodes in (("modules", edges), ("packages", rooms(edges))):
        size, depth = sum(map(len, nodes.values())), levels(nodes) or "a cycle"
        print(f"{title}: {len(nodes)}, levels: {depth}, edges: {size}")
    print("\n".join(["upward edges: " + str(len(upward(edges))), *upward(edges)]))


if __name__ == "__main__":
    main()
