"""Fit a mixture of two Gaussians by one Gaussian and by a mixture of two, under forward and reverse
KL. Prints the modes that are found, their starting points, and the number of steps."""

from __future__ import annotations

import sys
from pathlib import Path

from scripts.figures import canvas, save
from seqkd.cli.arguments import Parser

STARTS = 64
"""Number of random starts of two Gaussians."""


def main(argv: list[str] | None = None) -> int:
    """Print the tables and write the figures."""
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/toy_gaussians"), help="for figures")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    one_gaussian(args.out)
    two_gaussians(args.out)
    return 0


def one_gaussian(out: Path) -> None:
    """Fit a student that cannot match the teacher, from 25 starting means."""
    import torch

    from seqkd.studies.gaussians import GRID, TEACHER, WIDTH, fit, log_density, moments

    starts = torch.linspace(-6, 6, 25, dtype=torch.float64)[:, None]
    fits = {kind: fit(kind, starts, torch.zeros_like(starts)) for kind in ("forward", "reverse")}
    mean, deviation = moments()
    print(
        "One Gaussian to 0.6 N(-3, 0.8) + 0.4 N(2.5, 1.2), 25 starting means from -6 to 6\n"
        f"(the teacher's own mean is {mean:.3f}, its standard deviation {deviation:.3f})\n"
    )
    print(
        f"{'':10}{'ends at mean':>16}{'deviation':>12}{'KL (nats)':>12}{'starts':>8}   from means"
    )
    figure, (densities, ends_by_start) = canvas(1, 2, width=10, height=3.8)
    teacher = log_density(*TEACHER)[0].exp() / WIDTH
    densities.fill_between(GRID, teacher, color="0.85", label="teacher")
    for color, (kind, fitted) in zip(("C0", "C1"), fits.items(), strict=True):
        ends, label = fitted.means[:, 0], f"{kind} KL"
        ends_by_start.plot(starts[:, 0], ends, "o", label=label)
        for end in sorted({round(e, 1) for e in ends.tolist()}):
            near = (ends - end).abs() <= 0.1
            origins = starts[near, 0]
            print(
                f"{kind:10}{ends[near].mean():>16.3f}{fitted.scales[near, 0].mean():>12.3f}"
                f"{fitted.divergence[-1, near].mean():>12.4f}{int(near.sum()):>8}   "
                f"{origins.min():.1f} to {origins.max():.1f}"
            )
            density = fitted.log_density[int((ends - end).abs().argmin())].exp() / WIDTH
            densities.plot(GRID, density, color=color, label=label)
            label = None  # once in the legend
    for kind, fitted in fits.items():
        print(
            f"{kind}: steps to within 0.01 nats of the end: {_spread(fitted.steps_to_converge())}"
        )
    densities.set_xlim(-9, 9)
    densities.set_title("forward KL covers, reverse KL chooses")
    densities.legend()
    for mode in TEACHER[0][0]:
        ends_by_start.axhline(float(mode), color="grey", linewidth=1)
    ends_by_start.set_xlabel("starting mean")
    ends_by_start.set_ylabel("final mean")
    ends_by_start.set_title("which start finds which mode")
    ends_by_start.legend()
    save(figure, out / "one_gaussian.png")


def two_gaussians(out: Path) -> None:
    """Fit a student that can match the teacher, from random starts."""
    import torch

    from seqkd.studies.gaussians import fit

    generator = torch.Generator().manual_seed(0)
    means = torch.rand(STARTS, 2, generator=generator, dtype=torch.float64) * 12 - 6
    scales = 0.3 * torch.randn(STARTS, 2, generator=generator, dtype=torch.float64)
    quartiles = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    print(f"Two Gaussians to the same, {STARTS} random starts (seed 0)\n")
    print(f"{'':10}{'find the teacher':>18}{'steps to within 0.01 nats, of those':>48}")
    figure, (axis,) = canvas(1, 1, width=7, height=3.8)
    for kind in ("forward", "reverse"):
        fitted = fit(kind, means, scales)
        matched = fitted.divergence[-1] < 0.01
        steps = _spread(fitted.steps_to_converge()[matched])
        print(f"{kind:10}{f'{int(matched.sum())} of {STARTS}':>18}{steps:>48}")
        low, middle, high = fitted.divergence.quantile(quartiles, dim=1)
        axis.plot(middle, label=f"{kind} KL, median and quartiles")
        axis.fill_between(range(len(middle)), low, high, alpha=0.2)
    axis.set_yscale("log")
    axis.set_ylim(1e-6, None)
    axis.set_xlim(0, 500)
    axis.set_xlabel("step (Adam, 0.05)")
    axis.set_ylabel("KL (nats)")
    axis.legend()
    save(figure, out / "two_gaussians.png")


def _spread(steps):  # type: ignore[no-untyped-def]
    low, middle, high = (int(steps.double().quantile(q)) for q in (0.25, 0.5, 0.75))
    return f"median {middle}, quartiles {low} to {high}"


if __name__ == "__main__":
    sys.exit(main())
