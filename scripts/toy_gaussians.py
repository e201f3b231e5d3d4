"""Fit a mixture of two Gaussians by one Gaussian and by a mixture of two, under forward and reverse
KL: which modes each finds, from where, and in how many steps."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from scripts.figures import canvas, save


def main(argv: list[str] | None = None) -> int:
    """Print the tables; write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/toy_gaussians"), help="for figures")
    parser.add_argument("--starts", type=int, default=64, help="random starts of the two")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    one_gaussian(args.out)
    two_gaussians(args.out, args.starts, args.seed)
    return 0


def one_gaussian(out: Path) -> None:
    """A student too weak for the teacher, from 25 starting means."""
    import torch

    from seqkd.studies.gaussians import GRID, TEACHER, WIDTH, fit, log_density, moments

    starts = torch.linspace(-6, 6, 25, dtype=torch.float64)[:, None]
    fits = {kind: fit(kind, starts, torch.zeros_like(starts)) for kind in ("forward", "reverse")}
    mean, deviation = moments()
    modes = TEACHER[0][0]
    print(
        "One Gaussian to 0.6 N(-3, 0.8) + 0.4 N(2.5, 1.2), 25 starting means from -6 to 6\n"
        f"(the teacher's own mean is {mean:.3f}, its standard deviation {deviation:.3f})\n"
    )
    print(
        f"{'':10}{'ends at mean':>16}{'deviation':>12}{'KL (nats)':>12}{'starts':>8}   from means"
    )
    for kind, fitted in fits.items():
        ends = fitted.means[:, 0]
        for end in sorted({round(e, 1) for e in ends.tolist()}):
            at = (ends - end).abs() <= 0.1
            begun = starts[at, 0]
            print(
                f"{kind:10}{ends[at].mean():>16.3f}{fitted.scales[at, 0].mean():>12.3f}"
                f"{fitted.divergence[-1, at].mean():>12.4f}{int(at.sum()):>8}   "
                f"{begun.min():.1f} to {begun.max():.1f}"
            )
    for kind, fitted in fits.items():
        steps = fitted.steps_to_converge().double()
        print(f"{kind}: steps to within 0.01 nats of the end: {_spread(steps)}")
    figure, axes = canvas(1, 2, width=10, height=3.8)
    axes[0].fill_between(
        GRID, log_density(*TEACHER)[0].exp() / WIDTH, color="0.85", label="teacher"
    )
    for kind, fitted in fits.items():
        ends = fitted.means[:, 0]
        for number, end in enumerate(sorted({round(e, 1) for e in ends.tolist()})):
            density = fitted.log_density[int((ends - end).abs().argmin())].exp() / WIDTH
            color = {"forward": "C0", "reverse": "C1"}[kind]
            axes[0].plot(GRID, density, color=color, label=None if number else f"{kind} KL")
    axes[0].set_xlim(-9, 9)
    axes[0].set_title("forward KL covers, reverse KL chooses")
    axes[0].legend()
    for kind, fitted in fits.items():
        axes[1].plot(starts[:, 0], fitted.means[:, 0], "o", label=f"{kind} KL")
    for mode in modes:
        axes[1].axhline(float(mode), color="grey", linewidth=1)
    axes[1].set_xlabel("starting mean")
    axes[1].set_ylabel("final mean")
    axes[1].set_title("which start finds which mode")
    axes[1].legend()
    save(figure, out / "one_gaussian.png")


def two_gaussians(out: Path, starts: int, seed: int) -> None:
    """A student that can be the teacher, from random starts."""
    import torch

    from seqkd.studies.gaussians import fit

    generator = torch.Generator().manual_seed(seed)
    means = torch.rand(starts, 2, generator=generator, dtype=torch.float64) * 12 - 6
    scales = 0.3 * torch.randn(starts, 2, generator=generator, dtype=torch.float64)
    print(f"Two Gaussians to the same, {starts} random starts (seed {seed})\n")
    print(f"{'':10}{'find the teacher':>18}{'steps to within 0.01 nats, of those':>48}")
    figure, axes = canvas(1, 1, width=7, height=3.8)
    for kind in ("forward", "reverse"):
        fitted = fit(kind, means, scales)
        found = fitted.divergence[-1] < 0.01
        steps = fitted.steps_to_converge().double()[found]
        print(f"{kind:10}{f'{int(found.sum())} of {starts}':>18}{_spread(steps):>48}")
        path = fitted.divergence.quantile(
            torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64), dim=1
        )
        numbers = range(path.shape[1])
        axes[0].plot(numbers, path[1], label=f"{kind} KL, median and quartiles")
        axes[0].fill_between(numbers, path[0], path[2], alpha=0.2)
    axes[0].set_yscale("log")
    axes[0].set_ylim(1e-6, None)
    axes[0].set_xlim(0, 500)
    axes[0].set_xlabel("step (Adam, 0.05)")
    axes[0].set_ylabel("KL (nats)")
    axes[0].legend()
    save(figure, out / "two_gaussians.png")


def _spread(values):  # type: ignore[no-untyped-def]
    low, middle, high = (int(values.quantile(q)) for q in (0.25, 0.5, 0.75))
    return f"median {middle}, quartiles {low} to {high}"


if __name__ == "__main__":
    sys.exit(main())
