"""Plots of a page: metrics over steps or cost, held-out figures over cost, stage times."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from seqkd.escaping import printable
from seqkd.evaluation.catalog import metric, title
from seqkd.evaluation.heldout import teacher_figure
from seqkd.report.curves import POINTS, Array, CostAxis, column, curves, paths, spent, spent_before
from seqkd.report.svg import COLOR, Key, Panel, Plot, plot
from seqkd.storage.run_reader import Run

SECTIONS = {
    "Divergence and loss": ("reverse_kl_per_token", "forward_kl_per_token", "loss"),
    "Length and diversity": (
        "length", "eos_rate", "truncation_rate", "entropy_per_token", "repetition",
    ),
    "Optimization": (
        "grad_norm", "lr", "student_logprob_per_token", "teacher_logprob_per_token",
        "tokens_per_s",
    ),
    "Sampler and learner": (
        "logprob_gap_mean", "logprob_gap_max", "k1_per_token", "k3_per_token", "ratio_mean",
        "ratio_effective_sample_size",
    ),
    "Mixture with the teacher": ("teacher_samples", "mean_weight", "effective_sample_size"),
}  # fmt: skip
"""Metrics of metrics.jsonl that are plotted over steps, by heading."""
HELD_OUT = {
    "reverse_kl_per_token": "reverse_kl_per_token",
    "forward_kl_per_token": "forward_kl_per_token",
    "length": "student_length",
    "eos_rate": "student_eos_rate",
}
"""Metrics with the corresponding held-out figure."""
COSTS: tuple[CostAxis, ...] = ("learner_tokens", "seconds")
"""Additional horizontal axes for the divergences."""


def axis_title(on: CostAxis) -> str:
    """Return the title of a horizontal axis."""
    names = {"steps": "optimizer steps", "seconds": "minutes of training steps"}
    return names.get(on) or metric(on).label


def curve_panels(runs: Sequence[Run]) -> Iterator[tuple[str, list[Panel]]]:
    """Yield headings with their plots; headings without plots are omitted."""
    plotted: dict[str, list[tuple[str, CostAxis]]] = {
        heading: [(name, "steps") for name in names] for heading, names in SECTIONS.items()
    }
    plotted["Divergence against cost"] = [
        (name, on) for on in COSTS for name in ("reverse_kl_per_token", "forward_kl_per_token")
    ]
    for heading, pairs in plotted.items():
        if panels := [panel for name, on in pairs if (panel := curve_panel(runs, name, on))]:
            yield heading, panels


def curve_panel(runs: Sequence[Run], name: str, on: CostAxis = "steps") -> Panel | None:
    """Plot one metric of all runs; None if no run has it."""
    lines = list(_lines(runs, name))
    if not lines:
        return None
    values = np.concatenate([column(run.rows, source) for run, source, _ in lines])
    with plot(f"{name}-{on}".replace("_", "-"), title(name)) as drawn:
        for run, source, key in lines:
            _curves(drawn, run, source, key, on)
        for index, run in enumerate(runs):
            color = COLOR["ink"] if len(runs) == 1 else Key(index, "").line["color"]
            _held_out(drawn, run, HELD_OUT.get(name, ""), on, color)
        _teacher(drawn, runs, HELD_OUT.get(name, ""))
        unit = _frame(drawn, runs, on, values, metric(name).unit)
    samplers = [key for _, _, key in lines] if len(runs) == 1 < len(lines) else []
    return Panel(title(name), unit, drawn.svg, samplers)


def cost_panel(figure: str, methods: Mapping[Key, Sequence[Run]], on: CostAxis) -> Panel | None:
    """Plot a held-out figure of each method against a cost: thin lines for seeds, a thick line for
    their mean. None if no run has the figure."""
    lines = {key: curves for key, runs in methods.items() if (curves := paths(runs, figure, on))}
    if not lines:
        return None
    runs = [run for seeds in methods.values() for run in seeds]
    with plot(f"{figure}-{on}".replace("_", "-"), f"{title(figure)}, {axis_title(on)}") as drawn:
        for key, ((x, y), seeds) in lines.items():
            for seed in seeds if len(seeds) > 1 else ():
                drawn.axes.plot(*seed, **key.line, linewidth=0.8, alpha=0.45)
            drawn.axes.plot(x, y, **key.line, linewidth=2, marker="o", markersize=3.6)
            drawn.description += (
                f"{key.label}: from {y[0]:.3g} at {x[0]:.4g} to {y[-1]:.3g} at {x[-1]:.4g}. "
            )
        _teacher(drawn, runs, figure)
        values = np.concatenate([mean[1] for mean, _ in lines.values()])
        unit = _frame(drawn, runs, on, values, metric(figure).unit)
    return Panel(title(figure), unit, drawn.svg)


def stage_panel(name: str, run: str, steps: Array, stages: Mapping[str, Array]) -> Panel:
    """Plot the stacked seconds per step, [N] by stage. With many steps, each point is the mean of
    several steps."""
    parts = np.array_split(np.arange(len(steps)), min(len(steps), POINTS))
    edges = np.array([*(steps[part[0]] for part in parts), steps[-1] + 1])
    base = np.zeros(len(parts))
    with plot(name, f"Seconds per step of {run}") as drawn:
        for index, (stage, seconds) in enumerate(stages.items()):
            top = base + [seconds[part].mean() for part in parts]
            color = Key(index, stage).line["color"]
            drawn.axes.stairs(top, edges, baseline=base, fill=True, color=color)
            drawn.description += f"{stage}: {seconds.mean():.3g} s on average. "
            base = top
        _ticks(drawn, "steps", edges[0], edges[-1])
        drawn.axes.set_ylim(0, None)
    return Panel("Seconds per step", "", drawn.svg)


def _lines(runs: Sequence[Run], name: str) -> Iterator[tuple[Run, str, Key]]:
    """Yield the lines of a plot with their columns. With several runs, these are the columns of the
    phases' own samplers. With a single run, these are the columns of all samplers."""
    for index, run in enumerate(runs):
        columns = dict.fromkeys(key for row in run.rows for key in row)
        keyed = [
            key
            for key in sorted(columns, key=lambda key: "/" in key)
            if key.rpartition("/")[2] == name and np.isfinite(column(run.rows, key)).any()
        ]
        if len(runs) > 1:
            yield from ((run, key, Key(index, run.name)) for key in keyed if key == name)
            continue
        for number, key in enumerate(keyed):
            sampler = key.rpartition("/")[0]
            label = f"{sampler} samples" if sampler else "samples of the phase's sampler"
            yield run, key, Key(number, label)


def _curves(drawn: Plot, run: Run, source: str, key: Key, on: CostAxis) -> None:
    """Draw every step with a faint line, the mean with a thick line, and skipped steps as
    crosses."""
    phases = list(curves(run, source, spent(run, on)[:-1]))
    color, axes = key.line["color"], drawn.axes
    for curve in phases:
        if (curve.low < curve.high).any():  # each point combines several steps
            axes.fill_between(curve.x, curve.low, curve.high, color=color, alpha=0.2, linewidth=0)
        elif curve.window > 1:
            axes.plot(curve.x, curve.low, color=color, alpha=0.4, linewidth=0.8)
        marker = "o" if len(curve.x) == 1 else ""
        axes.plot(curve.x, curve.y, **key.line, linewidth=1.8, marker=marker, markersize=4)
    low, high = min(c.low.min() for c in phases), max(c.high.max() for c in phases)
    drawn.description += (
        f"{key.label}: from {phases[0].y[0]:.3g} to {phases[-1].y[-1]:.3g}; lowest {low:.3g}, "
        f"highest {high:.3g}. "
    )
    skipped = np.array([row["step"] for row in run.rows if row.get("skipped")], dtype=float)
    style = {"color": COLOR["ink"], "markersize": 5, "transform": axes.get_xaxis_transform()}
    axes.plot(
        spent_before(run, on, skipped), np.full(len(skipped), 0.035), "x", clip_on=False, **style
    )


def _held_out(drawn: Plot, run: Run, figure: str, on: CostAxis, color: str) -> None:
    """Draw a held-out figure with its intervals."""
    stages = [(s, row[figure]) for s, row in run.figures.values() if figure in row]
    if not stages:
        return
    steps, values = zip(*stages, strict=True)
    below, above = [v.mean - v.low for v in values], [v.high - v.mean for v in values]
    drawn.axes.errorbar(
        spent_before(run, on, np.array(steps)), [v.mean for v in values], [below, above],
        fmt="D", color=color, markersize=5, markeredgecolor=COLOR["paper"], markeredgewidth=0.8,
        elinewidth=1.4, capsize=3, zorder=5, clip_on=False,
    )  # fmt: skip
    drawn.description += f"On held-out prompts: {', then '.join(map(str, values))}. "


def _teacher(drawn: Plot, runs: Sequence[Run], figure: str) -> None:
    """Draw the teacher's value of a figure as a dashed line."""
    name = teacher_figure(figure)
    values = [row[name] for run in runs for _, row in run.figures.values() if name in row]
    if values:
        style = {"color": COLOR["muted"], "linewidth": 1.2, "dashes": (4, 3)}
        drawn.axes.axhline(values[-1].mean, **style)
        drawn.description += f"Teacher: {values[-1]}. "


def _frame(drawn: Plot, runs: Sequence[Run], on: CostAxis, values: Array, unit: str) -> str:
    """Set scale, limits and ticks. Shade every other phase if all runs have the same phases.
    Positive values that span two orders of magnitude have a log scale, which is added to the
    returned unit."""
    values = values[np.isfinite(values)]
    if values.min() > 0 and values.max() / values.min() > 100:
        drawn.axes.set_yscale("log")
        unit = f"{unit}, log scale".removeprefix(", ")
    end = max([1e-9, *(spent(run, on)[-1] for run in runs)])
    drawn.axes.margins(y=0.12)
    _ticks(drawn, on, -0.025 * end, 1.025 * end)
    same = len({tuple(run.spans) for run in runs}) == 1 and (len(runs) == 1 or on == "steps")
    spans = [span for span in runs[0].spans if span.begin < runs[0].done]
    for index, span in enumerate(spans if same and len(spans) > 1 else ()):
        low, high = spent_before(runs[0], on, np.array([span.begin, span.end]))
        if index % 2 == 0:
            drawn.axes.axvspan(low, high, color=COLOR["band"], linewidth=0, zorder=0)
        transform = drawn.axes.get_xaxis_transform()
        drawn.axes.text(low, 1.02, f" {printable(span.name)}", transform=transform, fontsize=10)
    return unit


def _ticks(drawn: Plot, on: CostAxis, low: float, high: float) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    axes = drawn.axes
    axes.set_xlim(low, high)
    axes.set_xlabel(axis_title(on), fontsize=10.5, labelpad=5)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=on == "steps"))
    logarithmic = axes.get_yscale() == "log"
    axes.yaxis.set_major_locator(LogLocator(numticks=5) if logarithmic else MaxNLocator(5))
    axes.yaxis.set_minor_formatter(NullFormatter())
    # The same format for all numbers: superscripts would need a font that the page does not have.
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.5g}"))
