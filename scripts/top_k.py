"""Measure the convergence of the divergence and its gradient with the number of tokens in the
teacher's scores: python scripts/top_k.py configs/quickstart.yaml"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from seqkd.cli.arguments import Parser
from seqkd.config import run as configuration
from seqkd.config.run import Config
from seqkd.console import quiet, run_command

KS = (1, 4, 16, 64, 256, 1024, 4096)


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0 for success, 2 for an error that the user can fix."""
    parser = Parser(description=__doc__)
    parser.add_argument("config", help="YAML file: student, teacher, data")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--prompts", type=int, default=16, help="held-out prompts")
    args = parser.parse_intermixed_args(argv)
    return run_command(lambda: table(configuration.load(args.config, args.overrides), args.prompts))


def table(config: Config, number: int) -> int:
    """Sample from both models and print the table."""
    quiet()
    import torch

    from seqkd.checks import preflight
    from seqkd.models.export import materialize_student
    from seqkd.models.loading import load_causal_lm
    from seqkd.studies.gradient_variance import sample
    from seqkd.studies.top_k import measure

    checked = preflight.check(config)
    with tempfile.TemporaryDirectory() as folder:
        path = materialize_student(config.student, "float32", Path(folder) / "student")
        student = load_causal_lm(path, "float32", "student.model")
    teacher = load_causal_lm(config.teacher.model, "float32", "teacher.model")
    torch.manual_seed(config.seed)
    prompts, eos = checked.heldout[:number], checked.stop_ids[0]
    for name, model in (("teacher", teacher), ("student", student)):
        rollouts = [r for p in prompts for r in sample(model, p, 1, config.rollout.max_tokens, eos)]
        rows = measure(student, teacher, rollouts, [k for k in KS if k < checked.vocabulary])
        tokens = sum(len(r.completion_ids) for r in rollouts)
        print(f"\n{len(prompts)} prompts, {tokens} tokens of the {name} (seed {config.seed})\n")
        print(
            f"{'k':>6}{'bytes/token':>13}{'tail':>10}{'forward KL':>12}{'gradient':>10}"
            f"{'reverse KL':>12}{'gradient':>10}"
        )
        for row in (*rows[1:], rows[0]):
            print(
                f"{row.k or 'all':>6}{row.bytes:>13}{row.tail:>10.2g}"
                + "".join(
                    f"{row.divergence[n]:>12.4f}{row.gradient_error[n]:>10.2g}"
                    for n in ("forward_kl", "reverse_kl")
                )
            )
    print("\ndivergences in nats per token; gradient: its relative error, at the student's states")
    return 0


if __name__ == "__main__":
    sys.exit(main())
