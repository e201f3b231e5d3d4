"""Measure the estimators of the sequence-level reverse KL: on enumerated languages their exact bias
and variance, and the students that each trains; with --student and --teacher, the variance of their
gradients on real models."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from scripts.figures import canvas, save


def main(argv: list[str] | None = None) -> int:
    """Print every table; write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Example: python -m scripts.estimators --student runs/quickstart/student "
        "--teacher ~/.cache/seqkd/models/SmolLM2-135M-Instruct",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/estimators"), help="for figures")
    parser.add_argument("--languages", type=int, default=8, help="languages trained on in (b)")
    parser.add_argument("--student", help="(c): a directory in transformers' format")
    parser.add_argument("--teacher", help="(c): likewise")
    parser.add_argument("--prompts", type=Path, help="(c): JSONL; the quickstart's if left out")
    parser.add_argument("--groups", type=int, default=24, help="(c): prompts")
    parser.add_argument("--samples", type=int, default=4, help="(c): completions a prompt")
    parser.add_argument("--tokens", type=int, default=48, help="(c): longest completion")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if bool(args.student) != bool(args.teacher):
        parser.error("--student and --teacher: (c) compares two models. Name both, or neither.")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.student:
        real_models(args)
        return 0
    bias_and_variance(args.out, args.seed)
    trained_students(args.out, args.seed, args.languages)
    return 0


def bias_and_variance(out: Path, seed: int) -> None:
    """(a) Exact, on one language, for a student far from the teacher and for a trained one."""
    from seqkd.studies.enumerated import Language
    from seqkd.studies.estimators import ROWS, quality, warm_up

    language = Language(seed, vocabulary=3, horizon=4)
    students = {"far": language.theta, "trained": warm_up(language)}
    print(
        f"(a) Exact, by enumeration: {len(language.sequences)} sequences of 3 tokens, up to 4 long "
        f"(seed {seed}).\n    Variance is relative to reward_to_go's, per sequence.\n"
    )
    print(f"{'':38}{'far student':^34}{'trained student':^34}")
    print(f"{'estimator':38}" + f"{'bias':>10}{'cosine':>10}{'variance':>12}  " * 2)
    relative: dict[str, dict[str, float]] = {name: {} for name in students}
    measured = {
        row.name: {name: quality(language, theta, row) for name, theta in students.items()}
        for row in ROWS
    }
    unit = {name: measured["reward_to_go"][name].variance for name in students}
    for row in ROWS:
        cells = ""
        for name, q in measured[row.name].items():
            relative[name][row.name] = q.variance / unit[name]
            cells += f"{q.bias:>10.1e}{q.cosine:>10.4f}{q.variance / unit[name]:>12.3f}  "
        print(f"{row.name:38}{cells}{'' if row.unbiased else 'biased'}")
    figure, axes = canvas(1, 1, width=8, height=4.5)
    axis = axes[0]
    names = [row.name for row in ROWS]
    for shift, (student, values) in zip((-0.2, 0.2), relative.items(), strict=True):
        places = [i + shift for i in range(len(names))]
        axis.barh(places, [values[n] for n in names], 0.38, label=f"{student} student")
    axis.set_yticks(range(len(names)), [n if r.unbiased else f"{n} (biased)"
                                        for n, r in zip(names, ROWS, strict=True)])  # fmt: skip
    axis.invert_yaxis()
    axis.set_xlabel("variance of the gradient, reward_to_go = 1")
    axis.legend()
    save(figure, out / "estimator_variance.png")


def trained_students(out: Path, seed: int, languages: int) -> None:
    """(b) What each objective trains a warmed-up student to, on several languages."""
    import numpy as np

    from seqkd.studies.enumerated import Language
    from seqkd.studies.estimators import TRAINED, describe, teacher_length, train, warm_up

    reached: dict[str, list[tuple[float, float, float]]] = {}
    for index in range(languages):
        language = Language(seed + index, vocabulary=3, horizon=8)
        start, teacher = warm_up(language), teacher_length(language)
        students = {"forward KL (start)": start} | {
            name: train(language, row, start) for name, row in TRAINED.items()
        }
        for name, theta in students.items():
            r = describe(language, theta)
            reached.setdefault(name, []).append((r.total, r.rate, r.length / teacher))
        print(f"\r(b) language {index + 1} of {languages}", end="", flush=True)
    print(
        f"\r(b) Trained to convergence on {languages} languages (3 tokens, up to 8 long), from the "
        "student of\n    least forward KL: mean [least, most] over languages, exact figures.\n"
    )
    labels = ("total (nats)", "rate (nats per token)", "length / teacher's")
    print(f"{'objective':22}" + "".join(f"{label:>26}" for label in labels))
    for name, rows in reached.items():
        cells = "".join(
            f"{f'{np.mean(v):.3f} [{min(v):.3f}, {max(v):.3f}]':>26}"
            for v in zip(*rows, strict=True)
        )
        print(f"{name:22}{cells}")
    figure, axes = canvas(1, 3, width=11, height=3.5)
    for axis, label, column in zip(axes, labels, range(3), strict=True):
        for place, (_name, rows) in enumerate(reached.items()):
            axis.plot([place] * len(rows), [row[column] for row in rows], "o", alpha=0.6)
        axis.set_xticks(range(len(reached)), list(reached), rotation=40, ha="right")
        axis.set_title(label)
    axes[2].axhline(1.0, color="grey", linewidth=1)
    save(figure, out / "estimator_trained.png")


def real_models(args: argparse.Namespace) -> None:
    """(c) The same completions of a real student through every estimator."""
    import torch
    import transformers

    from seqkd.config.data import DataConfig
    from seqkd.data.dataset import Reader
    from seqkd.data.readers import Source
    from seqkd.errors import SeqkdError
    from seqkd.models.loading import load_causal_lm, load_tokenizer
    from seqkd.studies.gradient_variance import costs_by_position, measure, sample

    transformers.utils.logging.disable_progress_bar()
    path = args.prompts or Path("~/.cache/seqkd/data/chat_train.jsonl").expanduser()
    try:
        tokenizer = load_tokenizer(args.student, "--student")
        data = DataConfig(path=str(path), system="Answer in one short sentence.")
        source = Source("--prompts", data.path)
        prompts = Reader(source, data, tokenizer, 0, limit=args.groups).read().table()
        student = load_causal_lm(args.student, "float32", "--student")
        teacher = load_causal_lm(args.teacher, "float32", "--teacher")
    except SeqkdError as error:
        sys.exit(f"error: {error}")
    torch.manual_seed(args.seed)
    groups = []
    for number, prompt in enumerate(prompts, 1):
        groups.append(sample(student, prompt, args.samples, args.tokens, tokenizer.eos_token_id))
        print(f"\r(c) sampling: prompt {number} of {args.groups}", end="", flush=True)
    print("\r(c) gradients of every estimator            ", end="", flush=True)
    costs, alive = costs_by_position(student, teacher, groups)
    found = measure(student, teacher, groups, (costs.sum() / alive.sum()).item(), args.seed)
    print(
        f"\r(c) {args.groups} prompts, {args.samples} completions each, the same for all "
        f"(seed {args.seed}).\n    Variance of a prompt's gradient over prompts, reward_to_go = 1; "
        "signal: squared norm of the mean gradient\n    over the variance of one prompt.\n"
    )
    unit = found["reward_to_go"].variance
    print(f"{'estimator':38}{'variance':>10}{'signal':>10}{'s/prompt':>10}")
    for name, v in found.items():
        signal = v.signal / v.variance
        print(f"{name:38}{v.variance / unit:>10.4f}{signal:>10.3f}{v.seconds:>10.2f}")
    print("\nreverse KL per token by position (nats)")
    for low in range(0, len(costs), 12):
        part = slice(low, low + 12)
        print(
            f"  tokens {low:>3} to {low + len(costs[part]) - 1:>3}"
            f"{costs[part].sum() / alive[part].sum():>10.3f}{int(alive[part].sum()):>8} tokens"
        )


if __name__ == "__main__":
    sys.exit(main())
