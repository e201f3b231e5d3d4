"""Common style of all figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def canvas(rows: int, columns: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """Return a figure and its axes, row by row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": plt.cycler(
            color=["#3366aa", "#dd7733", "#44996b", "#aa4477", "#777777", "#bb9922"]
        ),
        "legend.frameon": False,
    }
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), layout="constrained")
    return figure, [axes] if rows * columns == 1 else list(axes.flat)


def save(figure: Any, path: Path) -> None:
    """Write a PNG and print its path."""
    figure.savefig(path, dpi=150)
    print(f"\nfigure: {path}\n")
