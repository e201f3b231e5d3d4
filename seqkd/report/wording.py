"""What a page says of a run in words."""

from __future__ import annotations

from pathlib import PurePath

from seqkd.config.objectives import SequenceReverseKLConfig
from seqkd.config.phases import TermConfig
from seqkd.config.run import Config
from seqkd.config.samplers import SAMPLERS
from seqkd.config.student import PruneInitConfig
from seqkd.evaluation.intervals import Interval


def objective(term: TermConfig) -> str:
    """E.g. "token-level forward KL on the teacher's samples"; options where they differ from what
    they are when left out."""
    of = term.objective
    options = of.model_dump(exclude_defaults=True, exclude={"kind"})
    if isinstance(of, SequenceReverseKLConfig):
        options = {
            name: getattr(of, name) for name in ("estimator", "baseline", "normalization")
        } | options
    listed = ", ".join(f"{name} {value}" for name, value in options.items())
    weight = "" if term.weight == 1 else f"{term.weight:g} × "
    in_brackets = f" ({listed})" if listed else ""
    return f"{weight}{of.label}{in_brackets} on {SAMPLERS[term.sampler].label}"


def phases(config: Config) -> list[str]:
    """A line each: its steps and what it minimises."""
    return [
        f"{name}, {config.extent(phase)}: " + " + ".join(objective(term) for term in phase.terms)
        for name, phase in config.phases
    ]


def models(config: Config) -> tuple[str, str]:
    """Short names of the teacher and the student."""
    init = config.student.init
    student = _short(config.student.model)
    if isinstance(init, PruneInitConfig):
        student += f" without layers {init.drop_layers[0]} to {init.drop_layers[1] - 1}"
    return " + ".join(_short(teacher.model) for teacher in config.teachers.values()), student


def count(number: float) -> str:
    """With a narrow space between thousands."""
    return f"{number:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def duration(seconds: float) -> str:
    """E.g. "2 h 5 min", "3 min 4 s", "12.3 s"."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def change(interval: Interval) -> str:
    """A paired change with what its interval says."""
    if interval.low > 0 or interval.high < 0:
        return f"{signed(interval)}, excludes 0: {'lower' if interval.high < 0 else 'higher'}"
    return f"{signed(interval)}, includes 0: no difference shown"


def signed(interval: Interval) -> str:
    """With its sign and a true minus."""
    low, mean, high = (f"{v:+.3g}" for v in (interval.low, interval.mean, interval.high))
    return f"{mean} [{low}, {high}]".replace("-", "\N{MINUS SIGN}")


def stage(name: str) -> str:
    """Of a measurement, by what preceded it."""
    return "before" if name == "initial" else f"after {name}"


def between(pair: str) -> str:
    """The two measurements that a change is between: "before → after main"."""
    return " → ".join(stage(name) for name in pair.split(" -> "))


def printable(text: str) -> str:
    """With its code in place of each control character."""
    codes = [code for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"]
    return text.translate({code: f"\\x{code:02x}" for code in codes})


def _short(model: str) -> str:
    """A directory by its last part; a hub name as it is."""
    return PurePath(model).name if model.startswith(("/", "~", ".")) else model
