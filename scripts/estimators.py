"""Measure the estimators of the sequence-level reverse KL. On enumerated languages: their exact
bias and variance, and the students that they train. With --student and --teacher: the variance of
their gradients on real models."""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

from scripts.figures import canvas, save
from seqkd.cli.arguments import Parser

SEED = 0
LANGUAGES, SAMPLES, TOKENS = 8, 4, 48
PROMPTS = Path("~/.cache/seqkd/data/chat_train.jsonl").expanduser()


def main(argv: list[str] | None = None) -> int:
    """Print the tables and write the figures."""
    parser = Parser(
        description=__doc__,
        epilog="Example: python -m scripts.estimators --student runs/quickstart/student "
        "--teacher ~/.cache/seqkd/models/SmolLM2-135M-Instruct",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/estimators"), help="for figures")
    parser.add_argument("--student", help="(c): a directory in transformers' format")
    parser.add_argument("--teacher", help="(c): a directory in transformers' format")
    parser.add_argument("--groups", type=int, default=24, help="(c): prompts of the quickstart")
    args = parser.parse_args(argv)
    if bool(args.student) != bool(args.teacher):
        parser.error("--student and --teacher: set both or neither.")
    if args.student:
        real_models(args.student, args.teacher, args.groups)
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    bias_and_variance(args.out)
    trained_students(args.out)
    return 0


def bias_and_variance(out: Path) -> None:
    """Measure (a) on one language, for a student far from the teacher and for a trained one."""
    from seqkd.studies.enumerated import Language
    from seqkd.studies.estimators import ROWS, quality, warm_up

    language = Language(SEED, vocabulary=3, horizon=4)
    students = {"far": language.theta, "trained": warm_up(language)}
    print(
        f"(a) Exact, by enumeration: {len(language.sequences)} sequences of 3 tokens, up to 4 long "
        f"(seed {SEED}).\n    Variance is relative to reward_to_go's, per sequence.\n"
    )
    print(f"{'':38}{'far student':^34}{'trained student':^34}")
    print(f"{'estimator':38}" + f"{'bias':>10}{'cosine':>10}{'variance':>12}  " * 2)
    measured = {
        row.name: {name: quality(language, theta, row) for name, theta in students.items()}
        for row in ROWS
    }
    relative = {
        student: [
            measured[row.name][student].variance / measured["reward_to_go"][student].variance
            for row in ROWS
        ]
        for student in students
    }
    for number, row in enumerate(ROWS):
        cells = "".join(
            f"{q.bias:>10.1e}{q.cosine:>10.4f}{relative[student][number]:>12.3f}  "
            for student, q in measured[row.name].items()
        )
        print(f"{row.name:38}{cells}{'' if row.unbiased else 'biased'}")
    figure, (axis,) = canvas(1, 1, width=8, height=4.5)
    for shift, (student, variances) in zip((-0.2, 0.2), relative.items(), strict=True):
        places = [i + shift for i in range(len(ROWS))]
        axis.barh(places, variances, 0.38, label=f"{student} student")
    names = [row.name if row.unbiased else f"{row.name} (biased)" for row in ROWS]
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlabel("variance of the gradient, reward_to_go = 1")
    axis.legend()
    save(figure, out / "estimator_variance.png")


def trained_students(out: Path) -> None:
    """Measure (b): the results of training a warmed-up student with each objective, on several
    languages."""
    import numpy as np

    from seqkd.studies.enumerated import Language
    from seqkd.studies.estimators import TRAINED, describe, teacher_length, train, warm_up

    results: defaultdict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for index in range(LANGUAGES):
        language = Language(SEED + index, vocabulary=3, horizon=8)
        start, length = warm_up(language), teacher_length(language)
        students = {"forward KL (start)": start} | {
            name: train(language, row, start) for name, row in TRAINED.items()
        }
        for name, theta in students.items():
            result = describe(language, theta)
            results[name].append((result.total, result.rate, result.length / length))
        print(f"\r(b) language {index + 1} of {LANGUAGES}", end="", flush=True)
    print(
        f"\r(b) Trained to convergence on {LANGUAGES} languages (3 tokens, up to 8 long), from the "
        "student\n    with the lowest forward KL: mean [least, most] over languages, exact "
        "figures.\n"
    )
    labels = ("total (nats)", "rate (nats per token)", "length / teacher's")
    print(f"{'objective':22}" + "".join(f"{label:>26}" for label in labels))
    for name, rows in results.items():
        cells = "".join(
            f"{f'{np.mean(v):.3f} [{min(v):.3f}, {max(v):.3f}]':>26}"
            for v in zip(*rows, strict=True)
        )
        print(f"{name:22}{cells}")
    figure, axes = canvas(1, 3, width=11, height=3.5)
    for column, (axis, label) in enumerate(zip(axes, labels, strict=True)):
        for place, rows in enumerate(results.values()):
            axis.plot([place] * len(rows), [row[column] for row in rows], "o", alpha=0.6)
        axis.set_xticks(range(len(results)), list(results), rotation=40, ha="right")
        axis.set_title(label)
    axes[2].axhline(1.0, color="grey", linewidth=1)
    save(figure, out / "estimator_trained.png")


def real_models(student_path: str, teacher_path: str, number: int) -> None:
    """Measure (c): all estimators on the same completions of a real student."""
    import torch
    import transformers

    from seqkd.config.data import DataConfig
    from seqkd.data.dataset import Reader
    from seqkd.data.readers import Source
    from seqkd.errors import SeqkdError
    from seqkd.models.loading import load_causal_lm, load_tokenizer
    from seqkd.studies.gradient_variance import costs_by_position, measure, sample

    transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = load_tokenizer(student_path, "--student")
        data = DataConfig(path=str(PROMPTS), system="Answer in one short sentence.")
        source = Source("quickstart", data.path)
        prompts = Reader(source, data, tokenizer, 0, limit=number).read().table()
        student = load_causal_lm(student_path, "float32", "--student")
        teacher = load_causal_lm(teacher_path, "float32", "--teacher")
    except SeqkdError as error:
        sys.exit(f"error: {error}")
    torch.manual_seed(SEED)
    groups = []
    for index, prompt in enumerate(prompts, 1):
        groups.append(sample(student, prompt, SAMPLES, TOKENS, tokenizer.eos_token_id))
        print(f"\r(c) sampling: prompt {index} of {number}", end="", flush=True)
    print("\r(c) gradients of every estimator            ", end="", flush=True)
    costs, alive = costs_by_position(student, teacher, groups)
    variances = measure(student, teacher, groups, (costs.sum() / alive.sum()).item(), SEED)
    print(
        f"\r(c) {number} prompts, {SAMPLES} completions each, the same for all "
        f"(seed {SEED}).\n    Variance of a prompt's gradient over prompts, reward_to_go = 1; "
        "signal: squared norm of the mean gradient\n    over the variance of one prompt.\n"
    )
    unit = variances["reward_to_go"].variance
    print(f"{'estimator':38}{'variance':>10}{'signal':>10}{'s/prompt':>10}")
    for name, v in variances.items():
        signal = v.signal / v.variance
        print(f"{name:38}{v.variance / unit:>10.4f}{signal:>10.3f}{v.seconds:>10.2f}")
    print("\nreverse KL per token by position (nats)")
    low = 0
    for cost, tokens in zip(costs.split(12), alive.split(12), strict=True):
        high = low + len(cost) - 1
        mean, count = cost.sum() / tokens.sum(), int(tokens.sum())
        print(f"  tokens {low:>3} to {high:>3}{mean:>10.3f}{count:>8} tokens")
        low = high + 1


if __name__ == "__main__":
    sys.exit(main())
