"""Build the strategy task: data, a teacher trained from scratch, and a warmed-up student. With
--figures: train students with several objectives on one core, and plot when the sequence level
pays."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from scripts.figures import canvas, save

DEFAULT = Path("~/.cache/seqkd/strategies").expanduser()
SEED, SEEDS = 0, 2
METHODS = ("sft", "token-reverse-kl", "minillm", "total")
"""Methods of the figures."""
SHARES = (0.3, 0.5, 0.7, 0.9)


def main(argv: list[str] | None = None) -> int:
    """Write the models and the data, or the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="Example: python -m scripts.strategies --hard-share 0.9"
    )
    parser.add_argument("--out", type=Path, default=DEFAULT, help="for models and data")
    parser.add_argument("--digits", type=int, default=4, help="digits of a prompt (4)")
    parser.add_argument("--modulus", type=int, default=5, help="modulus of the sum (5)")
    parser.add_argument(
        "--hard-share", type=float, default=0.7, help="share of the hard strategy (0.7)"
    )
    parser.add_argument("--figures", type=Path, help="directory for the figures of the study")
    args = parser.parse_args(argv)
    if args.digits < 2 or args.modulus < 2:
        parser.error("--digits and --modulus: must be at least 2.")
    if not 0 < args.hard_share < 1:
        parser.error("--hard-share: must be above 0 and below 1.")

    import torch

    from seqkd.studies.strategies import Task

    torch.set_num_threads(1)
    if args.figures:
        if not (args.out / "teacher" / "model.safetensors").exists():
            parser.error(f"--figures: {args.out} has no teacher. Run without --figures first.")
        args.figures.mkdir(parents=True, exist_ok=True)
        figures(args.out, args.figures)
        return 0
    build(Task(args.digits, args.modulus, args.hard_share), args.out)
    return 0


def build(task: Any, out: Path) -> None:
    """Train and write both models, unless they exist."""
    from seqkd.studies import strategies as study

    if (out / "student" / "model.safetensors").exists():
        print(f"{out}: exists. Remove it to build it again.")
        return
    start = time.perf_counter()
    teacher = study.train_teacher(task, SEED)
    report("teacher", study.describe(teacher, teacher, task), start)
    student = study.model(task, study.STUDENT, SEED)
    study.warm_up(student, teacher, task, SEED)
    report("student after the warm-up", study.describe(student, teacher, task), start)
    study.save(out, task, {"teacher": teacher, "student": student})
    print(out)


def report(name: str, outcome: Any, start: float) -> None:
    """Print the figures of a model and the seconds so far."""
    print(
        f"{name}: accuracy {outcome.accuracy:.3f}, direct {outcome.hard:.3f} "
        f"(optimum {outcome.optimum:.3f}), reverse KL {outcome.reverse_kl:.2f}, forward KL "
        f"{outcome.forward_kl:.2f}, length {outcome.length:.2f}; "
        f"{time.perf_counter() - start:.0f} s",
        flush=True,
    )


def outcomes(task: Any, teacher: Any, size: Any, methods: tuple[str, ...]) -> dict[str, list[Any]]:
    """Train a student of a size with every method and several seeds, after one warm-up."""
    from seqkd.studies import strategies as study

    begin = time.perf_counter()
    warm = study.model(task, size, SEED)
    study.warm_up(warm, teacher, task, SEED)
    where = f"share {task.hard_share}, student {size}"
    rows = {"after the warm-up": [study.describe(warm, teacher, task)]}
    report(f"{where}, after the warm-up", *rows["after the warm-up"], begin)
    for name in methods:
        for seed in range(SEEDS):
            student = study.copied(warm)
            study.train(student, teacher, task, study.METHODS[name], seed)
            outcome = study.describe(student, teacher, task)
            report(f"{where}, {name}, seed {seed}", outcome, begin)
            rows.setdefault(name, []).append(outcome)
    return rows


def figures(models: Path, out: Path) -> None:
    """Plot accuracy against the share of the hard strategy and against the student's size, and
    q(direct) against its optimum."""
    from transformers import AutoModelForCausalLM

    from seqkd.studies import strategies as study

    first = AutoModelForCausalLM.from_pretrained(models / "teacher")
    sizes = (study.STUDENT, study.Size(1, 64, 128), study.TEACHER)
    by_share, by_size = {}, {}
    for share in SHARES:
        task = study.Task(hard_share=share)
        teacher = study.train_teacher(task, SEED, steps=200, start=first)
        by_share[share] = outcomes(task, teacher, study.STUDENT, METHODS)
        if share == study.Task().hard_share:
            by_size = {
                size: by_share[share]
                if size == study.STUDENT
                else outcomes(task, teacher, size, METHODS)
                for size in sizes
            }
    figure, (left, middle, right) = canvas(1, 3, width=12, height=3.6)
    for axis, groups in ((left, by_share), (middle, by_size)):
        for name in ("after the warm-up", *METHODS):
            for place, rows in enumerate(groups.values()):
                accuracies = [outcome.accuracy for outcome in rows[name]]
                color = f"C{('after the warm-up', *METHODS).index(name)}"
                axis.plot([place] * len(accuracies), accuracies, "o", color=color, alpha=0.4)
            means = [
                sum(o.accuracy for o in rows[name]) / len(rows[name]) for rows in groups.values()
            ]
            axis.plot(range(len(groups)), means, label=name)
        axis.set_xticks(range(len(groups)), list(map(str, groups)))
        axis.set_ylim(0, 1.03)
        axis.set_ylabel("accuracy on held-out prompts")
    left.set_xlabel("teacher's share of the hard strategy")
    middle.set_xlabel("student: layers x hidden size (MLP)")
    left.legend(loc="lower left")
    for name in METHODS:
        points = [
            (outcome.optimum, outcome.hard)
            for rows in (*by_share.values(), *by_size.values())
            for outcome in rows[name]
        ]
        color = f"C{('after the warm-up', *METHODS).index(name)}"
        right.plot(*zip(*points, strict=True), "o", color=color, alpha=0.6, label=name)
    right.plot([0, 1], [0, 1], color="grey", linewidth=1)
    right.set_xlabel("p(direct) exp(-F) / Z")
    right.set_ylabel("q(direct)")
    save(figure, out / "strategies.png")


if __name__ == "__main__":
    sys.exit(main())
