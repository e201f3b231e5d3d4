"""Learn a 64 x 64 softmax layer from teacher layers of several ranks, under forward and reverse KL:
how far the distributions and the weights are from the teacher's, step by step."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from scripts.figures import canvas, save


def main(argv: list[str] | None = None) -> int:
    """Print the table; write the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/toy_linear"), help="for the figure")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--optimizer", choices=("adam", "sgd"), default="adam")
    parser.add_argument("--lr", type=float, help="0.01 for adam, 1 for sgd if left out")
    args = parser.parse_args(argv)
    if args.seeds < 2:
        parser.error("--seeds: an interval needs at least 2.")
    if not all(1 <= rank <= 64 for rank in args.ranks):
        parser.error("--ranks: a 64 x 64 matrix has a rank from 1 to 64.")
    args.out.mkdir(parents=True, exist_ok=True)
    lr = args.lr or {"adam": 0.01, "sgd": 1.0}[args.optimizer]
    study(args.out, args.ranks, args.seeds, args.steps, args.optimizer, lr)
    return 0


def study(out: Path, ranks: list[int], seeds: int, steps: int, optimizer: str, lr: float) -> None:
    """Both divergences on the same teachers, starts and inputs."""
    import torch
    from scipy.stats import t as student_t

    from seqkd.studies.linear import DIVERGENCES, train

    def interval(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        half = student_t.ppf(0.975, seeds - 1) * values.std(0) / seeds**0.5
        return values.mean(0), half

    shown = [s for s in (10, 30, 100, 300, 1000, 3000) if s <= steps]
    print(
        f"{optimizer}, lr {lr:g}, {seeds} seeds: mean ± 95 % interval over seeds (t). Ahead: steps "
        "at which the paired\ninterval of the difference excludes 0.\n"
    )
    figure, axes = canvas(2, len(ranks), width=3 * len(ranks), height=5.5)
    for column, rank in enumerate(ranks):
        paths = {
            kind: [train(kind, rank, seed, optimizer, lr, steps) for seed in range(seeds)]
            for kind in DIVERGENCES
        }
        for row, (measure, label) in enumerate(
            (("distribution", "L2 of distributions"), ("weights", "relative L2 of weights"))
        ):
            values = {
                kind: torch.stack([getattr(p, measure) for p in of]) for kind, of in paths.items()
            }
            axis = axes[row * len(ranks) + column]
            print(f"rank {rank}, {label}")
            print(f"{'step':>10}" + "".join(f"{step:>18}" for step in shown))
            for kind, of_seeds in values.items():
                mean, half = interval(of_seeds)
                cells = "".join(f"{f'{mean[s]:.4f} ± {half[s]:.4f}':>18}" for s in shown)
                print(f"{kind:>10}{cells}")
                axis.plot(mean, label=f"{kind} KL")
                axis.fill_between(range(len(mean)), mean - half, mean + half, alpha=0.3)
            mean, half = interval(values["forward"] - values["reverse"])
            forward, reverse = (mean + half < 0)[1:], (mean - half > 0)[1:]
            print(
                f"{'ahead':>10}  forward at {int(forward.sum())}, reverse at "
                f"{int(reverse.sum())} of {steps} steps\n"
            )
            axis.set_xscale("symlog", linthresh=10)
            axis.set_title(f"rank {rank}" if row == 0 else "")
            axis.set_ylabel(label if column == 0 else "")
            axis.set_xlabel("step" if row == 1 else "")
    axes[0].legend()
    save(figure, out / f"linear_{optimizer}.png")


if __name__ == "__main__":
    sys.exit(main())
