"""Train a 64 x 64 softmax layer on teacher layers of several ranks, under forward and reverse KL.
Prints the distances of distributions and weights from the teacher's by step."""

from __future__ import annotations

import sys
from pathlib import Path

from scripts.figures import canvas, save
from seqkd.cli.arguments import Parser

RANKS = (1, 4, 16, 64)
STEPS = 1000
LEARNING_RATES = {"adam": 0.01, "sgd": 1.0}
SHOWN = (10, 30, 100, 300, 1000)
LABELS = {"distribution": "L2 of distributions", "weights": "relative L2 of weights"}


def main(argv: list[str] | None = None) -> int:
    """Print the table and write the figure. Both divergences use the same teachers and inputs."""
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/toy_linear"), help="for the figure")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--optimizer", choices=tuple(LEARNING_RATES), default="adam")
    args = parser.parse_args(argv)
    if args.seeds < 2:
        parser.error("--seeds: an interval needs at least 2.")
    args.out.mkdir(parents=True, exist_ok=True)
    lr = LEARNING_RATES[args.optimizer]
    print(
        f"{args.optimizer}, lr {lr:g}, {args.seeds} seeds: mean ± 95 % interval over seeds (t). "
        "Ahead: steps at which the paired\ninterval of the difference excludes 0.\n"
    )
    from seqkd.studies.linear import DIVERGENCES, train

    figure, axes = canvas(2, len(RANKS), width=3 * len(RANKS), height=5.5)
    for column, rank in enumerate(RANKS):
        paths = {
            kind: [train(kind, rank, s, args.optimizer, lr, STEPS) for s in range(args.seeds)]
            for kind in DIVERGENCES
        }
        for row, (quantity, label) in enumerate(LABELS.items()):
            axis = axes[row * len(RANKS) + column]
            print(f"rank {rank}, {label}")
            show(axis, {k: [getattr(p, quantity) for p in runs] for k, runs in paths.items()})
            axis.set_title(f"rank {rank}" if row == 0 else "")
            axis.set_ylabel(label if column == 0 else "")
            axis.set_xlabel("step" if row == 1 else "")
    axes[0].legend()
    save(figure, args.out / f"linear_{args.optimizer}.png")
    return 0


def show(axis, distances):  # type: ignore[no-untyped-def]
    """Print and plot the means of both divergences with their intervals."""
    import torch
    from scipy.stats import t as student_t

    def interval(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        quantile = student_t.ppf(0.975, len(values) - 1)
        return values.mean(0), quantile * values.std(0) / len(values) ** 0.5

    values = {kind: torch.stack(runs) for kind, runs in distances.items()}
    print(f"{'step':>10}" + "".join(f"{step:>18}" for step in SHOWN))
    for kind, by_seed in values.items():
        mean, half = interval(by_seed)
        cells = "".join(f"{f'{mean[s]:.4f} ± {half[s]:.4f}':>18}" for s in SHOWN)
        print(f"{kind:>10}{cells}")
        axis.plot(mean, label=f"{kind} KL")
        axis.fill_between(range(len(mean)), mean - half, mean + half, alpha=0.3)
    axis.set_xscale("symlog", linthresh=10)
    mean, half = interval(values["forward"] - values["reverse"])
    forward, reverse = ((sign * mean + half < 0)[1:].sum() for sign in (1, -1))
    print(f"{'ahead':>10}  forward at {forward}, reverse at {reverse} of {STEPS} steps\n")


if __name__ == "__main__":
    sys.exit(main())
